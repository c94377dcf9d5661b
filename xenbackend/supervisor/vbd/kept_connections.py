"""The connections of a disk to servers, kept beyond the worker that uses them: a successor's opener ends them.

Must not read from one, nor write to it.

What a worker had sent when it died the server may still do. While its connection is kept the server sees no end of it
that nobody asked for, and whoever comes next can see when the server has ended it (`opener.connecting`). It is kept
before the worker gets it. A worker that closes its chain in order says so, and nothing is kept of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from xenbackend.errors import ConfigError, printable
from xenbackend.protocol.opening import MAX_CONNECTIONS, KeptConnection


class Trouble(StrEnum):
    """Why a connection could not be seen to its end."""

    NONE = "none"
    SILENT = "silent"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class NotedConnection:
    """A connection, as the notes have it: ``none|0|unix:/run/nbd.sock``."""

    server: str
    place: int
    trouble: Trouble = Trouble.NONE

    def __str__(self) -> str:
        return f"{self.trouble.value}|{self.place}|{self.server}"

    @classmethod
    def parse(cls, text: str) -> NotedConnection:
        """Return what `str` made a text of."""
        trouble, place, server = text.split("|", 2)
        return cls(server, int(place), Trouble(trouble))


class KeptConnections:
    """One vbd's.

    Args:
        noted: returns what the notes say, by slot.
        note: changes that. Raises: ConfigError where it is too much.
        keep: has the keeper keep a slot's descriptor.
        forget: has the keeper let go of a slot's.
    """

    def __init__(
        self,
        noted: Callable[[], Mapping[str, str]],
        note: Callable[[dict[str, str]], None],
        keep: Callable[[str, int], None],
        forget: Callable[[str], None],
    ) -> None:
        self._noted = noted
        self._note = note
        self._keep = keep
        self._forget = forget
        self._fds: dict[str, int] = {}  # by slot

    def find(self, slot: str, fd: int) -> None:
        """Take over a slot's descriptor from an earlier service."""
        self._fds[slot] = fd

    def kept(self) -> list[tuple[KeptConnection, int]]:
        """Return them as a job names them, each with its descriptor; lent."""
        return [
            (KeptConnection(each.server, each.place, each.trouble is Trouble.BROKEN), self._fds[slot])
            for slot, each in self._all().items()
            if slot in self._fds
        ]

    def take(self, server: str, place: int, fd: int, *, is_alone: bool) -> str:
        """Keep a connection, ours from now on, in the place of one of the same name, or of all where it `is_alone`.

        Returns: why the worker may not have it, empty: it is kept.
        """
        known = self._all()
        same = [slot for slot, each in known.items() if is_alone or (each.server, each.place) == (server, place)]
        left = {slot: str(each) for slot, each in known.items() if slot not in same}
        taken = self._noted().keys() | self._fds.keys()
        slot = next(name for number in range(2 * MAX_CONNECTIONS + 2) if (name := f"s{number}") not in taken)
        try:
            if len(left) >= MAX_CONNECTIONS:
                raise ConfigError(f"the service keeps {MAX_CONNECTIONS} connections of a disk")
            self._note({**left, slot: str(NotedConnection(server, place))})
        except ConfigError as error:
            os.close(fd)
            return f"{printable(server)} cannot be connected to: {error}"
        self._fds[slot] = fd
        self._keep(slot, fd)
        for each in same:
            self._drop(each)
        return ""

    def is_undrained(self, server: str, place: int, *, is_broken: bool) -> None:
        """Take note that a connection could not be seen to its end."""
        trouble = Trouble.BROKEN if is_broken else Trouble.SILENT
        self._note(
            {
                slot: str(replace(each, trouble=trouble) if (each.server, each.place) == (server, place) else each)
                for slot, each in self._all().items()
            }
        )

    def accept_undrained(self) -> None:
        """Let go of those that could not be seen to their end: an administrator says that nothing is under way."""
        self._keep_only(lambda each: each.trouble is Trouble.NONE)

    def has_closed(self, server: str, place: int) -> None:
        """Let go of a connection that its worker has closed in order: nothing is under way."""
        self._keep_only(lambda each: (each.server, each.place) != (server, place))

    def let_go(self) -> None:
        """Forget all of them: the vbd has ended."""
        self._keep_only(lambda _: False)

    def leave(self) -> None:
        """Close our descriptors, and leave the keeper's to the next service."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors by slot; lent."""
        return dict(self._fds)

    def _all(self) -> dict[str, NotedConnection]:
        return {slot: NotedConnection.parse(text) for slot, text in self._noted().items()}

    def _keep_only(self, wanted: Callable[[NotedConnection], bool]) -> None:
        left = {slot: str(each) for slot, each in self._all().items() if wanted(each)}
        self._note(left)
        for slot in self._fds.keys() - left.keys():
            self._drop(slot)

    def _drop(self, slot: str) -> None:
        fd = self._fds.pop(slot, -1)
        if fd >= 0:
            os.close(fd)
            self._forget(slot)
