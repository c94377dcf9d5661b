"""What the workers of one vbd leave to each other, and one service to the next: journal, memories, a running worker.

Must not look into a memory, nor give one to another disk.

Everything is a descriptor: the supervisor has it open, and the keeper has it too, under a name that says which vbd's it
is. So a worker and the service may die at the same moment, and the next service finds all of it. What the descriptors
do not tell themselves stands in the journal's notes.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from xenbackend import journal
from xenbackend.errors import ConfigError, KernelError
from xenbackend.protocol import messages
from xenbackend.protocol.messages import MAX_MEMORIES
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.xenstore.paths import VbdPath

_JOURNAL, _WORKER, _PIDFD = "journal", "worker", "pidfd"


class Handover:
    """One vbd's. A keeper that is in trouble is told about, and keeps no disk from being served.

    page         the journal's memory
    notes        what the supervisor has noted in it, for the next service
    worker       the socket and the pidfd of a worker that was inherited
    is_readable  False: what was inherited is of a program with another journal. That worker must finish by itself what
                 is in flight, and a new journal was begun
    """

    def __init__(
        self,
        keeper: Keeper,
        path: VbdPath,
        found: Mapping[str, int] | None = None,
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take over the descriptors `found` (see `sort_inherited`), or begin a journal.

        `complain` gets a sentence where the keeper fails. Raises: KernelError.
        """
        self._keeper = keeper
        self._prefix = prefix_of(path)
        self._complain = complain
        found = dict(found or {})
        self.worker = self._take_worker(found)
        self._journal = found.pop(_JOURNAL, -1)
        self.is_readable = self._journal < 0 or _is_ours(self._journal)
        if not self.is_readable:
            self._forget(_JOURNAL)
            os.close(self._journal)
        if self._journal < 0 or not self.is_readable:
            self._journal = _make_journal()
            self._keep(_JOURNAL, self._journal)
        self.page = memoryview(mmap.mmap(self._journal, journal.SIZE))
        self.notes: dict[str, Any] = _read(journal.NOTES, self.page) or {}
        slots = self.notes.get("memories", {})
        self._memories = {name: found.pop(slot) for slot, name in slots.items() if slot in found}
        for what, fd in found.items():  # kept by somebody who died before he had noted what it is
            os.close(fd)
            self._forget(what)

    def agreed(self) -> tuple[str, messages.Connect] | None:
        """Return the chain in service, and what was agreed with the frontend, as the last worker noted it."""
        found = _read(journal.AGREED, self.page)
        try:
            return (str(found["chain"]), messages.restore(messages.Connect, found["connect"])) if found else None
        except (KeyError, ValueError):  # a worker's bug must not end the service
            return None

    def swapped(self) -> tuple[str, str] | None:
        """Return the ``params`` that were and the chain that took their place, where the toolstack's keys may not know.

        A worker may have put it in and died, or the service, before either could say so.
        """
        swap = self.notes.get("swap")
        agreed = self.agreed()
        if swap is None or swap["to"] not in (self.notes.get("chain"), agreed[0] if agreed else ""):
            return None
        return swap["from"], swap["to"]

    def descriptors(self, chain: str) -> tuple[int, dict[str, int]]:
        """Return the journal and the memories by name for a worker that is to open `chain`; another chain's are closed.

        Raises: ConfigError, where the chain is too long to be noted.
        """
        if chain != self.notes.get("chain"):
            for name in list(self._memories):
                self.drop(name)
            self.note(chain=chain)
        return self._journal, dict(self._memories)

    def note(self, **values: Any) -> None:
        """Note values for the next service; None takes one out. Raises: ConfigError where it is too much."""
        notes = {key: value for key, value in {**self.notes, **values}.items() if value is not None}
        if notes == self.notes:
            return
        try:
            journal.NOTES.write(self.page, notes)
        except ValueError as error:
            raise ConfigError(f"the service cannot remember that for the next one: {error}") from None
        self.notes = notes

    def forgive(self) -> None:
        """Let no failed flush count any more, for a worker that serves nobody yet."""
        journal.poison(self.page, 0)

    def keep_worker(self, socket_fd: int, pidfd: int) -> None:
        """Have a worker kept that was just started: its socket stays open when we die."""
        self._keep(_PIDFD, pidfd)
        self._keep(_WORKER, socket_fd)

    def forget_worker(self) -> None:
        """Take note that the worker has ended."""
        self._forget(_WORKER)
        self._forget(_PIDFD)

    def keep(self, name: str, fd: int) -> None:
        """Take over a memory's descriptor, in the place of a former one of that name; one too many is closed."""
        self.drop(name)
        if len(self._memories) >= MAX_MEMORIES:
            os.close(fd)
            return
        self._memories[name] = fd
        slots = self.notes.get("memories", {})
        slot = next(f"m{number}" for number in range(MAX_MEMORIES + 1) if f"m{number}" not in slots)
        self._keep(slot, fd)
        try:
            self.note(memories={**slots, slot: name})
        except ConfigError:  # it outlives the worker, not the service
            self._forget(slot)

    def drop(self, name: str) -> None:
        """Let go of a memory, if there is one of that name."""
        fd = self._memories.pop(name, -1)
        if fd < 0:
            return
        os.close(fd)
        slots = self.notes.get("memories", {})
        self.note(memories={slot: each for slot, each in slots.items() if each != name})
        for slot in [slot for slot, each in slots.items() if each == name]:
            self._forget(slot)

    def close(self) -> None:
        """Let go of everything: the vbd has ended."""
        for name in list(self._memories):
            self.drop(name)
        self._forget(_JOURNAL)
        self.leave()

    def leave(self) -> None:
        """Close our descriptors, and leave the keeper's to the next service."""
        for fd in (self._journal, *self._memories.values()):
            os.close(fd)
        self._memories.clear()
        self.page.release()

    def _take_worker(self, found: dict[str, int]) -> tuple[int, int] | None:
        """Return the worker among what was found; one whose socket nobody has kept is killed, and has an end at once.

        It could not be talked to, and has to have ended before another one may touch the rings.
        """
        near, pidfd = found.pop(_WORKER, -1), found.pop(_PIDFD, -1)
        if pidfd < 0:
            if near >= 0:  # to it we are gone: it closes the disk in order
                os.close(near)
                self._forget(_WORKER)
            return None
        if near < 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            end, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            far.close()
            near = end.detach()
        return near, pidfd

    def _keep(self, what: str, fd: int) -> None:
        with self._complaining():
            self._keeper.keep(f"{self._prefix}.{what}", fd)

    def _forget(self, what: str) -> None:
        with self._complaining():
            self._keeper.forget(f"{self._prefix}.{what}")

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except KernelError as error:
            self._complain(f"{error}: the next service would have to do without")


def prefix_of(path: VbdPath) -> str:
    """Return what the names of a vbd's descriptors begin with."""
    return f"{path.kind}-{path.backend_domid}-{path.frontend_domid}-{path.devid}"


def sort_inherited(keeper: Keeper, domid: int) -> dict[VbdPath, dict[str, int]]:
    """Return the descriptors that the keeper handed over, by vbd of the backend's domain `domid`.

    Those that are nobody's are closed and forgotten.
    """
    sorted_: dict[VbdPath, dict[str, int]] = {}
    for name, fd in keeper.inherited.items():
        path, what = _parse_name(name)
        if path is not None and path.backend_domid == domid:
            sorted_.setdefault(path, {})[what] = fd
        else:
            os.close(fd)
            with suppress(KernelError):
                keeper.forget(name)
    keeper.inherited.clear()
    return sorted_


def is_of_a_disk(name: str) -> bool:
    """Return whether the keeper has something of a vbd's under this name."""
    return _parse_name(name)[0] is not None


def _parse_name(name: str) -> tuple[VbdPath | None, str]:
    """Return the vbd that a descriptor's name is of, and which of its descriptors; see `prefix_of`."""
    vbd, _, what = name.partition(".")
    kind, *numbers = vbd.split("-")
    if what and len(numbers) == 3 and all(each.isdecimal() for each in numbers):
        return VbdPath(kind, *map(int, numbers)), what
    return None, ""


def _read(note: journal.Note, page: memoryview) -> dict[str, Any] | None:
    try:
        return note.read(page)
    except ValueError:  # a worker has the same memory, and may have a bug
        return None


def _is_ours(fd: int) -> bool:
    """Return whether a journal is laid out as this program knows it."""
    return os.fstat(fd).st_size == journal.SIZE and journal.is_readable(memoryview(mmap.mmap(fd, journal.SIZE)))


def _make_journal() -> int:
    try:
        fd = os.memfd_create("xenbackend-journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, journal.SIZE)
    except OSError as error:
        raise KernelError("make a journal", error.errno or errno.EIO) from None
    return fd
