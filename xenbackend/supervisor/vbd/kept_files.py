"""The files of a disk (image, parents, records), kept while it lives: an O_PATH descriptor and an identity of each.

Must not open a file, nor query one: an opener does, and says which file it found.

A disk stays the file that it was when it was attached, whatever becomes of the name. So the first opening of a name
leaves a descriptor and an identity here, and every later opening for the same disk goes through that descriptor. It is
kept before a worker gets the file. If the descriptor is lost, because the service was stopped, the identity alone
decides: the file that the name then leads to is compared with the noted one.

During an exchange the names of the new chain are looked up anew. The files found are compared with those in service,
and kept beside them until the exchange has been done or not:

    of           served      both            next
    if done      dropped     kept, served    kept, served
    if not       kept        kept, served    dropped
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from xenbackend.block.files import UNNAMED
from xenbackend.errors import ConfigError, printable
from xenbackend.kernel.identity import difference, from_text, has_grown
from xenbackend.protocol.jobs import MAX_FILES
from xenbackend.supervisor.vbd.slots import Slots

_MAX_KEY = 1500  # bytes; a value in xenstore has 2048
_UNNAMED_LOST = (
    "what the guest wrote was in an unnamed file, and was lost when the service was stopped; detach the disk: "
    "attached again, it begins as the image below"
)


class Of(StrEnum):
    """Which chain a file belongs to."""

    SERVED = "served"  # the one in service
    BOTH = "both"
    NEXT = "next"  # the one that is being put in


@dataclass(frozen=True, slots=True)
class NotedFile:
    """A file of the disk: the name by which it was opened, and its identity as `kernel.identity` writes it.

    The notes have it as a short text, ``served|file device=2049 inode=12|/img``, since a disk may have hundreds.
    """

    name: str
    identity: str
    of: Of = Of.SERVED

    def __str__(self) -> str:
        return f"{self.of.value}|{self.identity}|{self.name}"

    @classmethod
    def parse(cls, text: str) -> NotedFile:
        """Return the file that `str` turned into this text."""
        of, identity, name = text.split("|", 2)
        return cls(name, identity, Of(of))


def key_of(name: str) -> str:
    """Return the name, or its hash if it is too long for a value in xenstore."""
    data = name.encode(errors="surrogateescape")
    return name if len(data) <= _MAX_KEY else f"sha256 {hashlib.sha256(data).hexdigest()}"


class KeptFiles:
    """The kept files of one vbd, in its slots."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self._refused: set[str] = set()  # names that led to another file since the disk was last served
        self._texts: Mapping[str, str] = {}  # from which `_parsed` was made
        self._parsed: dict[str, NotedFile] = {}

    def kept(self) -> list[tuple[NotedFile, int]]:
        """Return the files in service that have a descriptor, each with the descriptor, which stays ours."""
        served = ((slot, file) for slot, file in self._files().items() if file.of is not Of.NEXT)
        return [(file, self.slots[slot]) for slot, file in served if slot in self.slots]

    def identities(self) -> dict[str, str]:
        """Return the identities of the files in service by name, as `kernel.identity` writes them."""
        return {file.name: file.identity for file in self._files().values() if file.of is not Of.NEXT}

    def has_unnamed(self) -> bool:
        """Return whether the disk in service has an unnamed file, which is lost once its descriptor is closed."""
        return any(file.name == UNNAMED for file, _ in self.kept())

    def expect(self, identities: Mapping[str, str]) -> None:
        """Note the identities that an earlier service noted elsewhere, by `key_of` their names, without descriptors.

        Raises: ConfigError, if they do not fit into the notes; ValueError, if one is no identity.
        """
        for identity in identities.values():
            from_text(identity)
        self.let_go()
        self.slots.note({f"f{number}": str(NotedFile(*each)) for number, each in enumerate(identities.items())})

    def check(
        self, name: str, identity: str, *, is_next: bool = False, replaces: bool = False, may_grow: bool = False
    ) -> str:
        """Return why a file may not be opened by this name: another one is in service. Empty: it may.

        `is_next`: it is of a chain that is being put in. Another file is allowed there if the new chain `replaces` the
        content, and the same partition with another size if it `may_grow`.
        """
        known, found = self._file(name, is_next=False), from_text(identity)
        noted = from_text(known[1].identity) if known else found
        differs = difference(noted, found)
        if not differs or (is_next and (replaces or (may_grow and has_grown(noted, found)))):
            return ""
        if name == UNNAMED:
            return _UNNAMED_LOST
        if is_next:
            return f"{printable(name)} is not the file in service: {differs}; if it has the same content, add --replace"
        return (
            f"{printable(name)} is not what the disk was served from: {differs}; put the former one back, or make "
            "sure that this one has the same content; then `xenbackend resume` serves the disk from what is there"
        )

    def take(
        self,
        name: str,
        identity: str,
        fd: int,
        *,
        is_next: bool = False,
        replaces: bool = False,
        may_grow: bool = False,
        is_again: bool = False,
    ) -> str:
        """Keep a file that is being opened, by its O_PATH descriptor, ours from now on; the rest is as for `check`.

        `is_again`: it takes the place of the descriptor that we have of the same file, which has become useless.

        Returns: why it may not be opened; empty if it is kept. Raises: ValueError, if `identity` is none.
        """
        try:
            sentence = self.check(name, identity, is_next=is_next, replaces=replaces, may_grow=may_grow)
            if sentence and not is_next:
                self._refused.add(name)
            if not sentence:
                sentence = self._add(name, identity, fd, is_next=is_next, is_again=is_again)
        except BaseException:
            os.close(fd)
            raise
        if fd not in self.slots.descriptors().values():
            os.close(fd)
        return sentence

    def accept_others(self) -> None:
        """Accept the files that refused names lead to now: an administrator wants the disk to be served again.

        All other files stay, even if the disk could not be opened with one of them: their names may be gone, or lead to
        other files, so that nothing else has what the guest wrote. This is true of the unnamed file at all times.
        Until the disk is served, a name that was refused stays accepted, so that yet another file may be tried.
        """
        files, refused = self._files(), self._refused - {UNNAMED}
        self.slots.note({slot: str(file) for slot, file in files.items() if file.name not in refused})
        self.slots.drop_unnoted()

    def before_exchange_alone(self) -> dict[str, str]:
        """Return what to note before another chain is put in without a worker: it has the unnamed file, too.

        All other names are looked up anew. An unnamed file that was lost is no longer expected.
        """
        both = {
            slot: str(replace(file, of=Of.BOTH))
            for slot, file in self._files().items()
            if file.name == UNNAMED and slot in self.slots
        }
        return {**self.slots.noted(), **both}

    def forget_refusals(self) -> None:
        """Forget which names were refused: the disk is served from what is kept, or from another chain."""
        self._refused.clear()

    def after_exchange(self, *, is_done: bool) -> dict[str, str]:
        """Return what to note once an exchange has been done or not. Then call `slots.drop_unnoted`."""
        gone = Of.SERVED if is_done else Of.NEXT
        files = self._files().items()
        return {slot: str(replace(file, of=Of.SERVED)) for slot, file in files if file.of is not gone}

    def let_go(self) -> None:
        """Drop all files: another chain is to be opened, or the vbd has ended."""
        self.slots.note({})
        self._refused.clear()
        self.slots.drop_unnoted()

    def _files(self) -> dict[str, NotedFile]:
        noted = self.slots.noted()
        if noted is not self._texts:
            self._texts = noted
            self._parsed = {slot: NotedFile.parse(text) for slot, text in noted.items()}
        return self._parsed

    def _file(self, name: str, *, is_next: bool) -> tuple[str, NotedFile] | None:
        key = key_of(name)
        for slot, file in self._files().items():
            if key_of(file.name) == key and (file.of is Of.NEXT) == is_next:
                return slot, file
        return None

    def _add(self, name: str, identity: str, fd: int, *, is_next: bool, is_again: bool) -> str:
        """Note a file that may be opened, and have its descriptor kept. Return why that failed; empty if it did not."""
        served, former = self._file(name, is_next=False), self._file(name, is_next=True)
        is_served = served is not None and not difference(from_text(served[1].identity), from_text(identity))
        if served is not None and is_served:
            slot, file = served[0], replace(served[1], name=name, of=Of.BOTH if is_next else served[1].of)
        else:
            slot = former[0] if former is not None else self.slots.free()
            file = NotedFile(name, identity, Of.NEXT if is_next else Of.SERVED)
        files = {**self.slots.noted(), slot: str(file)}
        if served is not None and not is_served and is_next:  # once it was the same: a device that has grown since
            files[served[0]] = str(replace(served[1], of=Of.SERVED))
        if len(files) > MAX_FILES:
            return (
                f"{printable(name)} is one file too many: the service keeps {MAX_FILES} for each disk; merge some of "
                "them"
            )
        try:
            self.slots.note(files)
        except ConfigError as error:
            return f"{printable(name)} cannot be opened: {error}"
        if is_again or not (is_served and slot in self.slots):
            self.slots.put(slot, fd)
        return ""
