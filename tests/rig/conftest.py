"""A rig for each test, and a small backend on its ports that the test's own thread steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from xenbackend.blkif.abi import BLKIF_OP_DISCARD, BLKIF_OP_READ, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY, LAYOUTS, ring_entries
from xenbackend.blkif.request import Decoder, RingRequest
from xenbackend.blkif.ring import BackRing
from xenbackend.kernel.ports import GRANT_OK, CopySegment, Mapping, open_host
from xenbackend.rig.frontend import CLOSED, CLOSING, CONNECTED, INIT_WAIT, INITIALISED, Frontend, Wishes
from xenbackend.rig.guest import Guest
from xenbackend.rig.xen import Xen
from xenbackend.units import PAGE, SECTOR

DOMID = 5
FRONT = f"/local/domain/{DOMID}/device/vbd/51712"
BACK = f"/local/domain/0/backend/vbd/{DOMID}/51712"


class DictStore:
    """The interface that a frontend needs of a store, on top of a dictionary."""

    def __init__(self) -> None:
        self.nodes: dict[str, str] = {f"{FRONT}/backend": BACK}
        self._changed = os.eventfd(0, os.EFD_NONBLOCK)

    def read_optional(self, path: str) -> str | None:
        """Return a node's value."""
        return self.nodes.get(path)

    def write(self, path: str, value: str) -> None:
        """Write a node."""
        self.nodes[path] = value

    def watch(self, path: str, token: str) -> None:
        """Do nothing: whoever waits is woken by stepping the backend."""

    def events(self) -> list[tuple[str, str]]:
        """Return no event."""
        return []

    def fileno(self) -> int:
        """Return a descriptor that is never readable."""
        return self._changed


@dataclass
class Served:
    """One ring as the backend sees it."""

    mapping: Mapping
    ring: BackRing
    port: int


@dataclass
class EchoBackend:
    """A backend with a disk of bytes behind every ring; `answer` may be replaced to misbehave."""

    directory: Path
    store: DictStore
    sectors: int = 2048
    offers: dict[str, int] = field(default_factory=dict)
    rings: list[Served] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)  # as they came from the wire, indirect ones as 6

    def __post_init__(self) -> None:
        host = open_host(f"xenbackend.rig.host:{self.directory}")
        self.fence = host.fence
        self.grants = host.open_grants(DOMID)
        self.events = host.open_events(DOMID)
        self.arena = host.allocate(512 * PAGE)
        self.disk = bytearray(self.sectors * SECTOR)
        self.answer: Callable[[BackRing, int, int, int, int], None] = BackRing.put_response
        for key, value in self.offers.items():
            self.store.nodes[f"{BACK}/{key}"] = str(value)
        self.set_state(INIT_WAIT)

    def step(self, _timeout_s: float = 0) -> None:
        """Do everything that is due, once."""
        state = int(self.store.nodes.get(f"{FRONT}/state", 1))
        if state == INITIALISED and not self.rings:
            self.connect()
        elif state == CLOSING:
            self.set_state(CLOSING)
        elif state == CLOSED:
            self.disconnect()
        for port in self.events.pending():
            for served in self.rings:
                if served.port == port:
                    self.serve(served)
                    self.events.unmask(port)

    def connect(self) -> None:
        """Map the rings that the frontend announced, and say what the disk is."""
        nodes = self.store.nodes
        self.layout = LAYOUTS[nodes.get(f"{FRONT}/protocol", "x86_64-abi")]
        order = int(nodes.get(f"{FRONT}/ring-page-order", 0))
        queues = int(nodes.get(f"{FRONT}/multi-queue-num-queues", 1))
        for number in range(queues):
            prefix = f"{FRONT}/queue-{number}" if queues > 1 else FRONT
            keys = [f"ring-ref{page}" for page in range(1 << order)] if order else ["ring-ref"]
            mapping = self.grants.map([int(nodes[f"{prefix}/{key}"]) for key in keys], writable=True)
            ring = BackRing(mapping.view, self.layout, ring_entries(self.layout, order), self.fence)
            self.rings.append(Served(mapping, ring, self.events.bind(int(nodes[f"{prefix}/event-channel"]))))
        for key, value in (("sectors", self.sectors), ("sector-size", SECTOR), ("info", 0)):
            nodes[f"{BACK}/{key}"] = str(value)
        self.set_state(CONNECTED)

    def disconnect(self) -> None:
        """Release the rings."""
        for served in self.rings:
            self.events.unbind(served.port)
            served.ring.release()
            served.mapping.release()
        self.rings.clear()
        self.set_state(CLOSED)

    def close(self) -> None:
        """Release everything, as a process's end does."""
        for served in self.rings:
            served.ring.release()
        self.grants.close()
        self.events.close()

    def set_state(self, state: int) -> None:
        """Write our state."""
        self.store.nodes[f"{BACK}/state"] = str(state)

    def serve(self, served: Served) -> None:
        """Answer every request of a ring."""
        ring = served.ring
        size = self.layout.slot_size
        decoder = Decoder(
            self.layout, self.sectors, read_only=False, can_flush=True, can_discard=True, max_segments=256
        )
        while ring.available() or ring.final_check():
            slot = bytearray(size)
            ring.take(memoryview(slot), 1)
            self.operations.append(slot[0])
            record = RingRequest(0, None, None)
            decoder.decode(memoryview(slot), [record])
            if record.indirect:
                self.copy([(gref, 0, PAGE) for gref in record.indirect], to_guest=False)
                decoder.decode_indirect(record, memoryview(bytes(self.arena.view[: PAGE * len(record.indirect)])))
            status = record.refused.status if record.refused else self.do(record)
            self.answer(ring, ring.consumed - 1, record.guest_id, record.operation, status)
            if ring.publish(ring.consumed):
                self.events.notify(served.port)

    def do(self, record: RingRequest) -> int:
        """Do a request and return its status."""
        start = record.first_sector * SECTOR
        span = slice(start, start + record.length)
        if record.operation == BLKIF_OP_DISCARD:
            self.disk[span] = bytes(record.length)
            return BLKIF_RSP_OKAY
        grefs = record.grefs or ([record.gref] if record.length else [])
        spans = record.spans or [(0, PAGE)] * len(grefs)
        segments = [(gref, offset, length) for gref, (offset, length) in zip(grefs, spans, strict=True)]
        if record.operation == BLKIF_OP_READ:
            self.arena.view[: record.length] = self.disk[span]
            return self.copy(segments, to_guest=True)
        status = self.copy(segments, to_guest=False)
        if status == BLKIF_RSP_OKAY:
            self.disk[span] = self.arena.view[: record.length]
        return status

    def copy(self, pieces: list[tuple[int, int, int]], *, to_guest: bool) -> int:
        """Copy each (gref, offset, length) in order, from or to the arena."""
        segments = []
        place = 0
        for gref, offset, length in pieces:
            segments.append(CopySegment(gref, offset, place, length, to_guest))
            place += length
        statuses = self.grants.copy(self.arena, segments)
        return BLKIF_RSP_OKAY if all(status == GRANT_OK for status in statuses) else BLKIF_RSP_ERROR


OFFERS = {
    "max-ring-page-order": 4, "multi-queue-max-queues": 8, "feature-persistent": 1, "feature-flush-cache": 1,
    "feature-barrier": 1, "feature-discard": 1, "feature-max-indirect-segments": 256,
}  # fmt: skip


@dataclass
class Bench:
    """A rig with one guest, a frontend and its backend, all in this thread except the hypervisor."""

    xen: Xen
    guest: Guest
    store: DictStore
    backend: EchoBackend
    front: str = FRONT
    back: str = BACK

    def frontend(self, wishes: Wishes | None = None) -> Frontend:
        """Return a frontend that is not connected yet."""
        return Frontend(self.guest, self.store, FRONT, wishes or Wishes(), idle=self.backend.step)


@pytest.fixture
def xen(tmp_path: Path) -> Iterator[Xen]:
    """A hypervisor; nothing may be held when the test is over."""
    with Xen(tmp_path) as xen:
        yield xen


@pytest.fixture
def bench(xen: Xen) -> Iterator[Bench]:
    """A guest and a backend that offers everything."""
    guest = Guest(xen.directory, DOMID)
    store = DictStore()
    backend = EchoBackend(xen.directory, store, offers=OFFERS)
    yield Bench(xen, guest, store, backend)
    backend.close()
    guest.close()
    assert {"mappings": 0, "pins": 0, "ports": 0} == xen.held()
