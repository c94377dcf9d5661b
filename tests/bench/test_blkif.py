"""The blkif load generators in Python and in C, against a backend in this test that answers as a hostile one might."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xenbackend.bench import loop, native
from xenbackend.bench.blkif import PAGES, BlkifLoop
from xenbackend.bench.blkif_native import NativeBlkifLoop
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
    """A generator with its backend beside it, which answers whenever the generator looks."""

    def __init__(self, directory: Path, **how: Any) -> None:
        super().__init__("ours", Guest(directory, 1, PAGES), FENCE, persistent=True, verify=True, **how)
        self.size = SMALLEST
        host = open_host(str(directory))
        self.grants = host.open_grants(1)
        self.events = host.open_events(1)
        self.port = self.events.bind(self.parameters().rings[0].event_channel)
        self.has_thread = False  # whether a thread answers
        self.mapping = self.grants.map(self.parameters().rings[0].grefs, writable=True)
        self.back = BackRing(self.mapping.view, NATIVE, ring_entries(NATIVE, 0), FENCE)
        self.taken: list[tuple[int, int, int, int]] = []  # operation, segments, first sector, first gref
        self.status = 0
        self.shift = 0
        self.held = 0
        self.pending: list[bytearray] = []
        self.ids: list[bytes] = []  # of the requests in flight at the last look

    def reap(self) -> list[int]:
        """Answer, unless a thread does, then reap the answers."""
        if not self.has_thread:
            self.answer_all()
        return super().reap()

    def serve_until(self, is_over: threading.Event) -> None:
        """Answer as a backend does that sleeps."""
        while not is_over.is_set():
            if not self.back.final_check():
                select.select([self.events.fileno()], [], [], 0.01)
                for port in self.events.pending():
                    self.events.unmask(port)
            self.answer_all()

    def answer_all(self) -> None:
        """Answer all but the `held` oldest, the youngest first if some are held."""
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
        if self.back.publish(place):
            self.events.notify(self.port)

    def serve(self, slot: bytearray) -> tuple[int, int]:
        """Stamp a read's page, or note by how much a write's stamp is off; return (guest id, operation)."""
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
        self.events.close()
        self.back.release()
        self.mapping.release()
        self.grants.close()
        self._guest.close()


class NativeBackend(Backend, NativeBlkifLoop):
    """The same backend with the generator in C."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The compiled inner part of the generator."""
    return native.build(tmp_path_factory.mktemp("native")).loop


@pytest.fixture(params=["Python", "C"])
def ours(request: pytest.FixtureRequest, tmp_path: Path, library: Path | None) -> Iterator[Backend]:
    """A generator and its backend on a rig."""
    if request.param == "C" and library is None:
        pytest.skip("no C compiler is installed")
    with Xen(tmp_path):
        backend = Backend(tmp_path) if request.param == "Python" else NativeBackend(tmp_path, library=library)
        yield backend
        backend.close()


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_requests_are_what_the_workload_says(ours: Backend, work: Work) -> None:
    """Places come in their order, the depth is kept, and long requests are indirect."""
    order = places(work, SMALLEST)
    ours.start(work, order)

    assert work.depth == ours.back.available()

    ours.renew(ours.reap())
    expected = [(int(work.write), work.length // 4096, place) for place in order[: work.depth]]

    assert expected == [taken[:3] for taken in ours.taken]
    assert work.depth == len({gref for *_, gref in ours.taken})
    assert ours.shift == 0  # a write's data began with the number of its sector


def test_answers_in_any_order(ours: Backend) -> None:
    """A slot's buffers are reused only after its own answer, in whatever order answers come."""
    ours.held = 5
    work = BY_NAME["rr4k"]
    ours.start(work, places(work, SMALLEST))
    for _ in range(20):
        ours.renew(ours.reap())

        assert work.depth == len(set(ours.ids)) == len(ours.ids)


def test_wrong_data_ends_the_measurement(ours: Backend) -> None:
    """A read with another sector's data is an error that names both sectors."""
    ours.shift = 8
    ours.start(BY_NAME["rr4k-1"], [16])
    with pytest.raises(BenchError, match="ours answered a read of sector 16 with the data of sector 24"):
        ours.renew(ours.reap())


@pytest.mark.parametrize("name", ["rr4k", "sw64k"])
def test_an_error_ends_the_measurement(ours: Backend, name: str) -> None:
    """A request that failed ends the measurement."""
    ours.status = -1
    ours.start(BY_NAME[name], places(BY_NAME[name], SMALLEST))
    with pytest.raises(BenchError, match="ours answered a request with an error"):
        ours.reap()


@pytest.mark.parametrize("number", [1, 31, 2**32])
def test_an_answer_to_nothing_ends_the_measurement(ours: Backend, number: int) -> None:
    """An answer to a request that was never made ends the measurement."""
    ours.start(BY_NAME["rr4k-1"], [0])
    ours.back.put_response(0, number, 0, 0)
    ours.back.publish(1)
    with pytest.raises(BenchError, match="or answered one that was not made"):
        super(Backend, ours).reap()


def test_a_backend_that_falls_silent_ends_the_measurement(ours: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that sends notifications but no answers ends the measurement after a limit."""
    monkeypatch.setattr("xenbackend.bench.blkif.STALL", 0.02)
    if isinstance(ours, NativeBlkifLoop):
        ours._state.stall_ms = 20
    ours.start(BY_NAME["rr4k-1"], [0])
    ours.events.notify(ours.port)
    with pytest.raises(BenchError, match=f"ours has not answered for {loop.STALL:.0f} seconds"):
        super(Backend, ours).reap()


@pytest.mark.parametrize("poll_ns", [0, 10**9], ids=["asleep", "looking"])
def test_a_whole_run(ours: Backend, poll_ns: int) -> None:
    """All requests are answered, one at a time is timed, whether the generator sleeps or polls."""
    work = BY_NAME["rr4k"]
    ours.poll_ns, ours.has_thread = poll_ns, True
    is_over = threading.Event()
    thread = threading.Thread(target=ours.serve_until, args=(is_over,))
    ours.start(work, order := places(work, SMALLEST))
    thread.start()
    try:
        windows = [super(Backend, ours).run(0.02) for _ in range(2)]
        ours.drain(work)
    finally:
        is_over.set()
        thread.join()
    requests = sum(window.requests for window in windows) + work.depth

    assert requests == len(ours.taken)
    assert order[:100] == [sector for _, _, sector, _ in ours.taken][:100]
    for window in windows:
        assert 0 < len(window.latencies) <= window.requests
        assert sum(window.latencies) <= window.seconds * 1e9
        assert 0 <= window.busy <= 1
        assert window.seconds >= 0.02


def test_more_answers_than_requests(ours: Backend) -> None:
    """More responses than requests end the measurement."""
    ours.start(BY_NAME["rr4k-1"], [0])
    ours._ring.index[2] = 9
    with pytest.raises(BenchError, match="ours announced 9 responses to 1 requests"):
        super(Backend, ours).reap()


def test_pages_lie_scattered(ours: Backend) -> None:
    """The pages of a request are hardly ever adjacent in the guest's memory, which would favour our side."""
    neighbours = sum(one + 1 == two for one, two in zip(ours._frames, ours._frames[1:], strict=False))

    assert neighbours < len(ours._frames) // 100


def test_the_ring_is_a_guests_ring(ours: Backend) -> None:
    """A worker is told what a guest would write into xenstore: one page, one port, persistent grants."""
    parameters = ours.parameters()

    assert (NATIVE.protocol, True, 1) == (parameters.protocol, parameters.persistent, len(parameters.rings[0].grefs))
    assert isinstance(ours._front, GuestRing)
