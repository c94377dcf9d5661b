"""What one worker of a vbd leaves to the next, and one service to the next: journal, memories, a running worker.

Must not look into a memory that a worker gave, nor give one to another disk, nor give the notes to any worker.

Everything is a descriptor that both the supervisor and the keeper have open, the keeper under a name (`inheritance`).
So worker and service may die at the same moment, and the next service finds everything.

    journal   what is in flight (`xenbackend.journal`); every worker is given it and may write to it
    notes     what only the supervisor writes (`notes`)
    m0, m1 …  memories of layers; the notes have the name of each
    f0, f1 …  the disk's files (`kept_files`); the notes have the name and identity of each
    s0, s1 …  connections to servers (`kept_connections`); the notes have the server of each
    worker    the socket of the running worker      pidfd   its process

What an older version left is converted: its worker is killed, and once it is dead (`inheritance.end_predecessor`) its
journal and memories are copied (`former`). The keeper is given our notes last. Until then the former descriptors count,
and if this service dies, the next one begins again.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from xenbackend import journal
from xenbackend.errors import ConfigError, KernelError
from xenbackend.kernel import memfd
from xenbackend.kernel.process import kill
from xenbackend.protocol import codec
from xenbackend.protocol.messages import MAX_MEMORIES, Agreed, Connect
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd import former, notes
from xenbackend.supervisor.vbd.inheritance import OPEN_FILES, What, current, is_memory, name_of
from xenbackend.supervisor.vbd.kept_connections import KeptConnections
from xenbackend.supervisor.vbd.kept_files import KeptFiles
from xenbackend.supervisor.vbd.notes import Exchange, Notes
from xenbackend.supervisor.vbd.slots import Slots
from xenbackend.supervisor.xenstore.paths import VbdPath


class Handover:
    """The handover of one vbd. If the keeper fails, `complain` is told, and the disk is served all the same.

    page         the journal's memory
    notes        see `Notes`; changed by `note`
    files        the files that the disk was opened from
    connections  the connections to servers that the disk is served from
    worker       the socket and the pidfd of a worker that was inherited and is not taken over yet, or None
    on_note      called when the notes have changed
    """

    def __init__(
        self,
        keeper: Keeper,
        path: VbdPath,
        found: Mapping[What, int] | None = None,
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take over the descriptors `found` (see `inheritance`), or begin a journal and notes.

        If a former version's worker is among them, it must have ended. `complain` gets a sentence if something is lost
        to this service or to the next one. Raises: KernelError; then all of the descriptors are closed.
        """
        self._keeper = keeper
        self._path = path
        self._complain = complain
        ours = {what: fd for what, fd in (found or {}).items() if what == current(what[0]) and what[0] != OPEN_FILES}
        theirs = {what: fd for what, fd in (found or {}).items() if what not in ours}
        self.worker: tuple[int, int] | None = None
        self.on_note: Callable[[], None] = lambda: None
        self._unkept: dict[str, int] = {}
        self._journal = self._notes = -1
        self._memories: dict[str, int] = {}
        self.files = KeptFiles(
            self._slots("f", lambda: self.notes.files, lambda files: self.note(files=files)),
        )
        self.connections = KeptConnections(
            self._slots("s", lambda: self.notes.connections, lambda found: self.note(connections=found)),
        )
        try:
            self._take(ours, theirs)
        except Exception:
            held = {*self._unkept.values(), self._journal, self._notes, *self._memories.values(), *(self.worker or ())}
            kept = [fd for slots in self._all_slots() for fd in slots.descriptors().values()]
            for fd in {*ours.values(), *theirs.values(), *held, *kept} - {-1}:
                os.close(fd)
            raise

    def _slots(
        self, letter: str, noted: Callable[[], Mapping[str, str]], note: Callable[[dict[str, str]], None]
    ) -> Slots:
        return Slots(letter, noted, note, self._keep, lambda slot: self._forget(current(slot)))

    def _all_slots(self) -> tuple[Slots, Slots]:
        return self.files.slots, self.connections.slots

    def _take(self, ours: dict[What, int], theirs: dict[What, int]) -> None:
        """Take over what was found. A descriptor leaves `ours` or `theirs` only once something else holds it."""
        self.worker = self._take_worker(ours)
        self._journal, self.page = self._take_memory(ours, "journal", journal.SIZE)
        self._notes, self._notes_page = self._take_memory(ours, "notes", notes.SIZE)
        self.notes = notes.read(self._notes_page)
        for slot, name in self.notes.memories.items():
            if current(slot) in ours:
                self._memories[name] = ours.pop(current(slot))
        for slots in self._all_slots():
            for slot in slots.noted():
                if current(slot) in ours:
                    slots.find(slot, ours.pop(current(slot)))
        self._let_go(ours)  # kept by a service that died before it noted what they are
        if "notes" in self._unkept:
            self._adopt(theirs)
            if current(OPEN_FILES) in theirs:
                self._recall(theirs[current(OPEN_FILES)])
        self._keep_new()
        self._let_go(theirs)

    def agreed(self) -> Agreed | None:
        """Return the chain in service and what is agreed with the frontend; None if nothing is agreed now."""
        left = self._left()
        return left if left is not None and left.connect is not None else None

    def connect(self) -> Connect | None:
        """Return what is agreed with the frontend now, None if nothing is."""
        return agreed.connect if (agreed := self.agreed()) is not None else None

    def _left(self) -> Agreed | None:
        """Return what the last worker noted in the journal.

        None if it noted nothing valid, or a chain that it was not told to serve: a worker is not trusted.
        """
        try:
            agreed: Agreed = codec.restore(Agreed, journal.AGREED.read(self.page))
        except codec.NotAMessage:
            return None
        exchange = self.notes.exchange
        return agreed if agreed.chain in (self.notes.chain, exchange and exchange.chain) else None

    def chain_in_service(self) -> str:
        """Return the chain that has the guest's data; empty for a disk that was never opened.

        During an exchange the journal decides: worker or service may have died before the result was reported.
        """
        exchange = self.notes.exchange
        agreed = self._left() if exchange is not None else None
        return agreed.chain if agreed is not None else self.notes.chain

    def has_exchanged(self) -> bool:
        """Return whether a worker noted that it has carried out the exchange under way.

        An exchange for the same text, because of another file or size, is known only by the number of its order.
        """
        exchange, left = self.notes.exchange, self._left()
        if exchange is None or left is None or left.chain != exchange.chain:
            return False
        return exchange.chain != self.notes.chain or left.order == exchange.order

    def exchange_is_done(self) -> None:
        """Note that the chain of the exchange under way, if there is one, is in service.

        The key ``params`` may still have the value from when the exchange began, or meanwhile the former chain.
        """
        exchange = self.notes.exchange
        if exchange is None:
            return
        files = self.files.after_exchange(is_done=True)
        changes: dict[str, Any] = {"exchange": None, "exchanged_by": exchange.order, "files": files, "undecided": ""}
        if exchange.chain != self.notes.chain:
            stale = dict.fromkeys([*self.notes.stale_params, exchange.former_params, self.notes.chain])
            stale.pop(exchange.chain, None)
            changes |= {"chain": exchange.chain, "stale_params": list(stale)}
        self.note(**changes)
        self.files.slots.drop_unnoted()

    def exchange_is_not_done(self) -> None:
        """Note that the exchange under way, if there is one, has left the former chain in service."""
        self.note(exchange=None, files=self.files.after_exchange(is_done=False))
        self.files.slots.drop_unnoted()

    def exchange_alone(self, exchange: Exchange) -> None:
        """Put another chain in while there is no worker, in the steps of a worker, so that a death between two is safe.

        Names are looked up anew, so only the unnamed file stays, which has none. All memories stay until a worker has
        opened the chain, and drops those that no layer of it wants. Raises: ConfigError; then nothing was changed.
        """
        self.note(exchange=exchange, files=self.files.before_exchange_alone())
        left = self._left()
        if left is not None:
            values = codec.as_fields(replace(left, chain=exchange.chain, order=exchange.order))
            journal.AGREED.write(self.page, values)
        self.exchange_is_done()
        self.files.forget_refusals()

    def saw_params(self, params: str) -> None:
        """Take note of the value of ``params``; if it is not a stale one, it has followed the chain."""
        if params not in self.notes.stale_params:
            self.note(stale_params=[])

    def descriptors(self, chain: str) -> tuple[int, dict[str, int]]:
        """Return journal and memories, by name, for a worker that is to open `chain`; another chain's are dropped.

        Raises: ConfigError, if the chain is too long to be noted.
        """
        if chain != self.notes.chain:
            for name in list(self._memories):
                self.drop(name)
            self.files.let_go()
            self.note(chain=chain)
        return self._journal, dict(self._memories)

    def expect(self, chain: str, identities: Mapping[str, str]) -> None:
        """Note the chain in service and the identities of its files, if nothing else was left to us."""
        if identities:
            try:
                self.files.expect(identities)
                self.note(chain=chain)
            except (ConfigError, ValueError) as problem:
                self._complain(f"the record of the disk's files cannot be used: {problem}")

    def note(self, **changes: Any) -> None:
        """Change fields of the notes. Raises: ConfigError, if they get too long; then nothing was changed."""
        self._write(replace(self.notes, **changes))
        self.on_note()

    def _write(self, changed: Notes) -> None:
        if changed == self.notes:
            return
        try:
            notes.write(self._notes_page, changed)
        except ValueError as error:
            raise ConfigError(f"the service cannot record that for the next one: {error}") from None
        self.notes = changed

    def poison(self, code: int) -> None:
        """Have the next worker wait for `resume`, since a flush failed with errno `code`; 0 takes that back."""
        journal.poison(self.page, code)

    def poison_for(self, sentence: str) -> None:
        """Do the same if xenstore says in a `sentence` that a flush failed, and the journal does not know of it."""
        if sentence and not journal.poisoned(self.page):
            self.poison(errno.EIO)

    def keep_worker(self, socket_fd: int, pidfd: int) -> None:
        """Have the keeper keep a worker that was just started, so that its socket stays open when we die."""
        self._keep("pidfd", pidfd)
        self._keep("worker", socket_fd)

    def forget_worker(self) -> None:
        """Have the keeper forget the worker, which has ended."""
        self._forget(current("worker"))
        self._forget(current("pidfd"))

    def keep(self, name: str, fd: int) -> str:
        """Take over a new memory's descriptor, in place of a former one of that name; if it is not kept, return why."""
        self.drop(name)
        if len(self._memories) >= MAX_MEMORIES:
            os.close(fd)
            return f"a disk has at most {MAX_MEMORIES} memories"
        slots = self.notes.memories
        slot = next(f"m{number}" for number in range(MAX_MEMORIES + 1) if f"m{number}" not in slots)
        self._keep(slot, fd)
        try:
            self.note(memories={**slots, slot: name})
        except ConfigError as problem:
            os.close(fd)
            self._forget(current(slot))
            return str(problem)
        self._memories[name] = fd
        return ""

    def drop(self, name: str) -> None:
        """Wipe and close the memory of that name, if there is one. It may hold a key."""
        fd = self._memories.pop(name, -1)
        if fd < 0:
            return
        with suppress(KernelError):  # the worker has made it unusable
            memfd.wipe(fd)
        os.close(fd)
        slots = self.notes.memories
        self.note(memories={slot: each for slot, each in slots.items() if each != name})
        for slot in [slot for slot, each in slots.items() if each == name]:
            self._forget(current(slot))

    def close(self) -> None:
        """Close everything, and have the keeper forget it: the vbd has ended."""
        if self.worker is not None:  # nobody has taken it over, and it uses the memories that are wiped now
            kill(self.worker[1])
        for name in list(self._memories):
            self.drop(name)
        self.files.let_go()
        self.connections.let_go()
        for kind in ("notes", "journal"):
            self._forget(current(kind))
        self.leave()

    def leave(self) -> None:
        """Close our descriptors, and leave the keeper's to the next service."""
        for fd in (self._journal, self._notes, *self._memories.values(), *(self.worker or ())):
            os.close(fd)
        self._memories.clear()
        for slots in self._all_slots():
            slots.leave()
        self.page.release()
        self._notes_page.release()

    def _take_worker(self, ours: dict[What, int]) -> tuple[int, int] | None:
        """Return socket and pidfd of the worker among what was found. One whose socket was not kept is killed.

        Nobody could talk to that one, and it must have ended before another one may touch the rings. Its socket here is
        a new one whose other end is closed.
        """
        pidfd = ours.get(current("pidfd"), -1)
        if pidfd < 0:  # its socket, if any, is closed with the rest, and it then closes the disk in order
            return None
        if current("worker") not in ours:
            kill(pidfd)
            end, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            far.close()
            ours[current("worker")] = end.detach()
        return ours.pop(current("worker")), ours.pop(current("pidfd"))

    def _take_memory(self, ours: dict[What, int], kind: str, size: int) -> tuple[int, memoryview]:
        """Map the memory that was found, or begin a new one. Raises: KernelError."""
        what = current(kind)
        try:
            if what in ours:
                page = memfd.map_sealed(ours[what], size)
                return ours.pop(what), page
        except KernelError as error:
            if error.errno != errno.EPERM:  # the trouble is the host's, not the memory's
                raise
            self._complain(f"the {kind} that was kept cannot be used: {error}")
            self._let_go({what: ours.pop(what)})
        if self.worker is not None:  # it still uses the memory that we have lost
            kill(self.worker[1])
        self._unkept[kind] = fd = memfd.make(f"xenbackend-{kind}", size)
        return fd, memfd.map_sealed(fd, size)

    def _adopt(self, theirs: Mapping[What, int]) -> None:
        """Copy what a former version left."""
        left = theirs.get(("journal", former.VERSION), -1)
        if left < 0:
            return
        is_over = ("pidfd", former.VERSION) in theirs or ("worker", former.VERSION) not in theirs
        memories: dict[str, str] = {}
        try:
            found = former.read_notes(left)
            if is_over:  # else its worker cannot be killed, and finishes by itself what it has in flight
                former.copy_journal(left, self.page)
        except KernelError as error:
            self._complain(f"{error}: the requests that a former version's worker had in flight are lost")
            return
        for slot, name in found.memories.items():
            fd = theirs.get((slot, former.VERSION), -1)
            if fd >= 0 and is_memory(slot) and name not in self._memories:
                try:
                    self._memories[name] = memfd.copy(fd, "xenbackend", _available())
                except KernelError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        raise
                    self._complain(f"{error}: the memory of layer {name} is lost")
                else:
                    memories[slot] = name
        try:
            self._write(replace(found, memories=memories))
        except ConfigError as error:
            self._complain(str(error))
            self._write(replace(found, memories={}))

    def _recall(self, remembered: int) -> None:
        """Note which files a former version's worker had open."""
        try:
            self._write(replace(self.notes, in_service=former.recall_files(remembered)))
        except (KernelError, ConfigError) as error:
            self._complain(f"{error}: allow the images of this disk with xenbackend image trust")

    def _keep_new(self) -> None:
        """Give the keeper what we have made, the notes last: from then on all of it counts."""
        if "journal" in self._unkept:
            self._keep("journal", self._unkept.pop("journal"))
        if "notes" in self._unkept:
            for slot, name in self.notes.memories.items():
                self._keep(slot, self._memories[name])
            self._keep("notes", self._unkept.pop("notes"))

    def _let_go(self, descriptors: dict[What, int]) -> None:
        """Close descriptors, and have the keeper forget them."""
        while descriptors:
            what, fd = descriptors.popitem()
            os.close(fd)
            self._forget(what)

    def _keep(self, kind: str, fd: int) -> None:
        self._ask_keeper(self._keeper.keep, name_of(self._path, current(kind)), fd)

    def _forget(self, what: What) -> None:
        self._ask_keeper(self._keeper.forget, name_of(self._path, what))

    def _ask_keeper(self, ask: Callable[..., None], *arguments: object) -> None:
        try:
            ask(*arguments)
        except KernelError as error:
            self._complain(f"{error}: the next service will not have it")


def _available() -> int:
    """Return how many bytes of memory the host has available, by its own estimate."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return 1024 * int(value.split()[0])
    return 0
