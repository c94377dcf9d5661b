"""The same messages to a worker as a host has it: a process behind its walls, below a service, that serves an image.

Must not choose a message, nor what is right: `messages` and `judge` do. What only the worker's own process could tell,
such as what reaches the disk, is not seen here. Seen are the answers, the first half of the disk and its other ring,
which belong to a verified load, another guest's disk, pages that nobody may write to, and that the worker lives.

It is slow: some 500 messages a second, where one thread does 7,000 and more.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

from tests.driven import DOMID
from tests.ring_fuzz.bed import ORDERS, Violation
from tests.ring_fuzz.episode import Episode
from tests.ring_fuzz.judge import Agreement
from tests.ring_fuzz.messages import ATTACKED, SECTORS
from tests.ring_fuzz.pages import Pages
from tests.ring_fuzz.rewriter import Rewriter
from tests.workload import Load, make_model
from xenbackend.blkif.abi import REQ_EVENT, REQ_PROD, RING_HEADER, RSP_EVENT, RSP_PROD, X86_32, X86_64
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes
from xenbackend.rig.guest_ring import GuestRing
from xenbackend.units import SECTOR

_PATIENCE_S = 30.0  # for an answer, on a busy machine
_LOOK_S = 0.02  # between two looks at a ring whose event index the guest itself has spoiled
_CLEAN = ("bugs", "overruns")  # counters that stay 0, as far as there are such


class Unseen:
    """In the place of a disk that knows what may reach it: nobody looks."""

    def __init__(self) -> None:
        self.allowed: dict[int, list[tuple[int, int, int]]] = {}
        self.open: set[int] = set()
        self.errors: dict[int, int] = {}


class FarBed:
    """A host with a guest that means ill and one that does not. Use it as a context manager.

    worker   the process that serves the first one, the same from connect to disconnect
    """

    def __init__(self, directory: Path) -> None:
        """Prepare; images and the service's log lie in `directory`."""
        self._directory = directory
        self._undo = ExitStack()
        self.disk = Unseen()
        self.hostile: GuestRing
        self.load: Load
        self.worker = 0
        self.agreed: Agreement

    def __enter__(self) -> FarBed:
        with ExitStack() as undo:
            self.log = self._directory / "service.log"
            self.machine = undo.enter_context(Machine(log=self.log))
            self._domain = self.machine.create_guest(DOMID, pages=8192)
            undo.callback(self._domain.close)
            self.guest = self._domain.memory
            self.pages = Pages(self.guest)
            self.frames, self.lists, self.list_pages = self.pages.frames, self.pages.lists, self.pages.list_pages
            self.rewriter = Rewriter(self.guest._memory_fd)
            undo.callback(self.rewriter.close)
            self._image = self._make("disk.img")
            self.path = self.machine.attach(DOMID, "xvda", f"aio:{self._image}")
            other = self.machine.create_guest(DOMID + 1)
            undo.callback(other.close)
            path = self.machine.attach(DOMID + 1, "xvda", f"aio:{self._make('other.img')}")
            self._neighbour = other.connect(path, Wishes(persistent=True))
            self.other = Load(self._neighbour, make_model(1, SECTORS))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _make(self, name: str) -> Path:
        path = self._directory / name
        path.write_bytes(bytes(SECTORS * SECTOR))
        return path

    def status(self) -> dict[str, Any]:
        """Return what the service says of the disk. Raises: Violation, where it says nothing."""
        for each in self.machine.ask({"verb": "status"})["data"]:
            if each["vbd"] == f"{DOMID}/xvda":
                return dict(each)
        raise Violation("the service does not know the disk any more")

    def see_worker(self) -> None:
        """See that the worker is the one that began, and behind its walls."""
        found = self.status()
        if found["worker"] != self.worker:
            raise Violation(f"the worker was {self.worker}, and is {found['worker']}: {found['error']}")
        if found["no_walls"]:
            raise Violation(f"the worker is not behind {found['no_walls']}")
        for name in _CLEAN:
            if found["counters"].get(name):
                raise Violation(f"{found['counters'][name]} {name} were counted")

    def connect(self, random: Random) -> None:
        """Serve the guest anew, agreed on otherwise."""
        with self._image.open("r+b") as image:
            image.write(bytes(SECTORS * SECTOR))
        for key in ("queue-0", "queue-1", "ring-page-order", "multi-queue-num-queues"):  # of the connection before
            self.machine.store.remove(f"{self.path.frontend}/{key}")
        layout = random.choice((X86_64, X86_64, X86_32))
        start = random.choice((0, 0, 2**31 - 9, 2**32 - 9, random.getrandbits(32)))
        wishes = Wishes(
            layout, ring_order=random.choice(ORDERS), queues=2, persistent=random.random() < 0.5, indirect=64,
            start_index=start,
        )  # fmt: skip
        self.frontend = self._domain.connect(self.path, wishes)
        self.worker = self.status()["worker"]
        self.hostile = self.frontend.rings.pop()
        facts = self.frontend.facts
        self.agreed = self.pages.agree(layout, read_only=False, can_flush=True, can_discard=facts.can_discard)
        model = make_model(random.getrandbits(32), ATTACKED, 32, can_discard=facts.can_discard)
        self.load = Load(self.frontend, model, _PATIENCE_S)

    def disconnect(self) -> None:
        """Let the guest go, and see that its worker has left nothing and touched nothing."""
        self.load.finish()
        self.other.run(8)
        self.other.finish()
        self.see_worker()
        self.frontend.close(_PATIENCE_S)
        if self.pages.are_touched():
            raise Violation("a page was written to that the guest had not granted for it")
        self.hostile.ring.index[RSP_PROD] = 0
        self.hostile.close()  # which raises where a page is still mapped
        held = self.machine.xen.held(DOMID)
        if held["mappings"] or held["pins"]:
            raise Violation(f"the worker still holds {held}")

    def lines_about_rings(self) -> int:
        """Return how often the log says that a ring was stopped."""
        return self.log.read_text().count("ring 1 was stopped")


class FarEpisode(Episode):
    """Messages from one connect to one disconnect, to a process."""

    # What the guest writes there is not told from what the worker writes, by which answers are found here.
    spoiled = (REQ_EVENT, RSP_EVENT)
    bed: FarBed

    def run(self, length: int = 500) -> None:
        """Send so many messages. Raises: Violation and others."""
        bed, random = self.bed, self.random
        bed.connect(random)
        while self.number < length:
            self._batch(random.randint(1, bed.hostile.ring.size))
            bed.other.top_up(2)
            bed.other.take()
        if random.random() < 0.5:
            self._break_indices()
        bed.disconnect()
        self.tally.count("episodes")

    def _await_answers(self) -> None:
        ring, give_up = self.bed.hostile.ring, time.monotonic() + _PATIENCE_S
        while (missing := (ring.produced - ring.consumed & 0xFFFFFFFF) - ring.waiting()) > 0:
            self.bed.load.take()
            self.bed.hostile.port.wait(_LOOK_S)
            self.bed.hostile.port.clear()
            if time.monotonic() > give_up:
                raise Violation(f"{missing} messages have no answer: {self.bed.status()['error'] or 'no reason'}")

    def _finish_neighbour(self) -> None:
        self.bed.load.finish()

    def _break_indices(self) -> None:
        """Announce more requests than there is room for: the ring is stopped, once, and the other one is not."""
        bed, random, ring = self.bed, self.random, self.bed.hostile.ring
        before = bed.lines_about_rings()
        for slot in range(ring.size):  # operations that nobody knows
            at = RING_HEADER + slot * bed.agreed.layout.slot_size
            bed.hostile.ring.pages[at : at + 2] = bytes((random.choice((77, 200, 3)), 0))
        for word in (REQ_EVENT, RSP_EVENT, RSP_PROD):
            ring.index[word] = random.getrandbits(32)
        ring.index[REQ_PROD] = ring.produced + ring.size + random.randint(1, 2**31) & 0xFFFFFFFF
        bed.hostile.port.notify()
        give_up = time.monotonic() + _PATIENCE_S
        while not (sentence := str(bed.status()["error"])):
            bed.load.top_up(2)
            bed.load.take()
            if time.monotonic() > give_up:
                raise Violation("a ring with more requests than it has room for goes on")
        if "ring 1 was stopped" not in sentence:
            raise Violation(f"a ring has to be stopped, and the service says {sentence!r}")
        if (lines := bed.lines_about_rings() - before) > 1:
            raise Violation(f"the end of one ring was told {lines} times")
        self.tally.count("messages")
        self.tally.count("stopped rings")
