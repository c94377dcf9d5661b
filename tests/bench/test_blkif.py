"""The blkif load generator against a backend in this test, which answers as a hostile one might."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.bench.blkif import PAGES, BlkifLoop
from xenbackend.bench.plan import SMALLEST, WORKS, BenchError, Work, places
from xenbackend.blkif.abi import BLKIF_OP_INDIRECT, NATIVE, ring_entries
from xenbackend.blkif.ring import BackRing
from xenbackend.kernel.fence import find_fence
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import GuestRing
from xenbackend.rig.host import open_host
from xenbackend.rig.xen import Xen

FENCE = find_fence()[0]
BY_NAME = {work.name: work for work in WORKS}


class Backend(BlkifLoop):
    """A generator with its backend beside it, which answers whenever the generator is about to look."""

    def __init__(self, directory: Path) -> None:
        super().__init__("ours", Guest(directory, 1, PAGES), FENCE, persistent=True, verify=True)
        self.size = SMALLEST
        host = open_host(str(directory))
        self.grants = host.open_grants(1)
        self.mapping = self.grants.map(self.parameters().rings[0].grefs, writable=True)
        self.back = BackRing(self.mapping.view, NATIVE, ring_entries(NATIVE, 0), FENCE)
        self.taken: list[tuple[int, int, int, int]] = []  # operation, segments, first sector, first gref
        self.status = 0
        self.shift = 0
        self.held = 0
        self.pending: list[bytearray] = []
        self.ids: list[bytes] = []  # of what was in flight at the last look

    def reap(self) -> list[int]:
        """Answer everything but the `held` oldest, the youngest first where they are held; then take the answers."""
        slots = self.pending
        while count := min(self.back.available(), self.back.until_wrap()):
            copy = bytearray(count * NATIVE.slot_size)
            self.back.take(memoryview(copy), count)
            slots += [copy[at : at + NATIVE.slot_size] for at in range(0, len(copy), NATIVE.slot_size)]
        place = self.back.answered
        self.pending, answered = slots[: self.held], slots[self.held :]
        self.ids = [bytes(slot[8:16]) for slot in slots]
        for slot in reversed(answered) if self.held else answered:
            self.back.put_response(place, *self.serve(slot), self.status)
            place += 1
        self.back.publish(place)
        return super().reap()

    def serve(self, slot: bytearray) -> tuple[int, int]:
        """Bring a read's stamp; return what the response says."""
        operation, segments, _, guest_id, sector, gref, _, _ = NATIVE.one.unpack(slot)
        if operation == BLKIF_OP_INDIRECT:
            _, operation, segments, guest_id, sector, _, page, *_ = NATIVE.indirect.unpack_from(slot)
            listed = self.grants.map([page], writable=False)
            gref = int.from_bytes(listed.view[:4], "little")
            listed.release()
        self.taken.append((operation, segments, sector, gref))
        data = self.grants.map([gref], writable=True)
        if operation:
            self.shift = int.from_bytes(data.view[:8], "little") - sector
        else:
            data.view[:8] = (sector + self.shift).to_bytes(8, "little")
        data.release()
        return guest_id, operation

    def close(self) -> None:
        """Release what the backend holds."""
        self.back.release()
        self.mapping.release()
        self.grants.close()
        self._guest.close()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Backend]:
    """A generator and its backend on a rig."""
    with Xen(tmp_path):
        backend = Backend(tmp_path)
        yield backend
        backend.close()


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_requests_are_what_the_workload_says(ours: Backend, work: Work) -> None:
    """Places come in their order, as many are in flight as the depth says, and long requests go indirect."""
    order = places(work, SMALLEST)
    ours.start(work, order)

    assert work.depth == ours.back.available()

    ours.renew(ours.reap())
    expected = [(int(work.write), work.length // 4096, place) for place in order[: work.depth]]

    assert expected == [taken[:3] for taken in ours.taken]
    assert work.depth == len({gref for *_, gref in ours.taken})
    assert ours.shift == 0  # a write's data began with the number of its sector


def test_answers_in_any_order(ours: Backend) -> None:
    """A slot's buffers are used again only when its own answer has come, in whatever order answers come."""
    ours.held = 5
    work = BY_NAME["rr4k"]
    ours.start(work, places(work, SMALLEST))
    for _ in range(20):
        ours.renew(ours.reap())

        assert work.depth == len(set(ours.ids)) == len(ours.ids)


def test_wrong_data_ends_the_measurement(ours: Backend) -> None:
    """A read that brings another sector's data is an error that names both."""
    ours.shift = 8
    ours.start(BY_NAME["rr4k-1"], [16])
    with pytest.raises(BenchError, match="ours answered a read of sector 16 with the data of sector 24"):
        ours.renew(ours.reap())


@pytest.mark.parametrize("name", ["rr4k", "sw64k"])
def test_an_error_ends_the_measurement(ours: Backend, name: str) -> None:
    """A request that failed is no request served."""
    ours.status = -1
    ours.start(BY_NAME[name], places(BY_NAME[name], SMALLEST))
    with pytest.raises(BenchError, match="ours answered a request with an error"):
        ours.reap()


def test_more_answers_than_requests(ours: Backend) -> None:
    """A backend that announces what was never asked for is no backend to measure."""
    ours.start(BY_NAME["rr4k-1"], [0])
    ours._ring.index[2] = 9
    with pytest.raises(BenchError, match="ours announced 9 responses to 1 requests"):
        BlkifLoop.reap(ours)


def test_pages_lie_scattered(ours: Backend) -> None:
    """Hardly any two neighbours in a request are neighbours in the guest's memory: no flattery for our side."""
    neighbours = sum(one + 1 == two for one, two in zip(ours._frames, ours._frames[1:], strict=False))

    assert neighbours < len(ours._frames) // 100


def test_the_ring_is_a_guests_ring(ours: Backend) -> None:
    """What a worker is told is what a guest would write into xenstore: one page, one port, persistent grants."""
    parameters = ours.parameters()

    assert (NATIVE.protocol, True, 1) == (parameters.protocol, parameters.persistent, len(parameters.rings[0].grefs))
    assert isinstance(ours._front, GuestRing)
