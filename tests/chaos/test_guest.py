"""Whatever a disk or a backend may do wrong is noticed by each load of the guests of chaos and soak."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.full_rings import FullRings, KnownDisk
from tests.served import SIZE, HeldDisk, Served
from tests.workload import Load, make_model, read_all
from xenbackend.blkif.abi import BLKIF_OP_WRITE, LAYOUTS, RSP_PROD
from xenbackend.block.driver import Geometry
from xenbackend.block.request import Op, Request
from xenbackend.rig.frontend import Wishes
from xenbackend.rig.guest_ring import BackendMisbehaved
from xenbackend.rig.pattern import Step, WrongData
from xenbackend.rig.table import GTF_READING
from xenbackend.units import SECTOR

TIMES = 20  # that a disk lies: the guest writes over some of it before it looks
Call = Callable[[], object]
SOON = 300  # requests, so that sectors have been written more than once


class LyingDisk(HeldDisk):
    """A disk that acknowledges everything, and does a few requests wrongly."""

    def __init__(self, lie: Callable[[LyingDisk, Request, bytes], bool] | None) -> None:
        super().__init__()
        self.lies = 0
        self.writes: list[tuple[int, bytes]] = []  # all, with their places
        self.former: dict[int, bytes] = {}  # what a sector held before it was written last, by its place
        self._lie = lie

    def _do(self, request: Request) -> None:
        start, end = request.offset, request.offset + request.length
        before = bytes(self.content[start:end]) if request.op == Op.WRITE else b"".join(request.iov)
        super()._do(request)
        if self._lie and len(self.seen) > SOON and self.lies < TIMES:
            self.lies += self._lie(self, request, before)
        if request.op == Op.WRITE:
            self.writes.append((start, bytes(self.content[start:end])))
            self.former |= {start + at: before[at : at + SECTOR] for at in range(0, request.length, SECTOR)}


# Lies: each gets what a write has overwritten, or what a guest had in the pages of a read, and returns whether it lied.


def lose_write(disk: LyingDisk, request: Request, before: bytes) -> bool:
    """Do nothing."""
    if request.op == Op.WRITE:
        disk.content[request.offset : request.offset + request.length] = before
    return request.op == Op.WRITE


def tear_write(disk: LyingDisk, request: Request, before: bytes) -> bool:
    """Write all but half of the last sector."""
    half = SECTOR // 2
    if request.op == Op.WRITE:
        end = request.offset + request.length
        disk.content[end - half : end] = before[-half:]
    return request.op == Op.WRITE


def write_next_sector_too(disk: LyingDisk, request: Request, _before: bytes) -> bool:
    """Write the last sector to the next one, too."""
    end = request.offset + request.length
    if request.op != Op.WRITE or end == SIZE:
        return False
    disk.content[end : end + SECTOR] = disk.content[end - SECTOR : end]
    return True


def swap_sectors(disk: LyingDisk, request: Request, _before: bytes) -> bool:
    """Write two sectors in each other's place."""
    if request.op != Op.WRITE or request.length < 2 * SECTOR:
        return False
    at = request.offset
    disk.content[at : at + 2 * SECTOR] = disk.content[at + SECTOR : at + 2 * SECTOR] + disk.content[at : at + SECTOR]
    return True


def repeat_write(disk: LyingDisk, _request: Request, _before: bytes) -> bool:
    """Do an earlier write once more, though there was another one at its place since."""
    for number, (start, data) in enumerate(disk.writes):
        if disk.content[start : start + len(data)] != data:
            del disk.writes[: number + 1]
            disk.content[start : start + len(data)] = data
            return True
    return False


def change_answer(change: Callable[[LyingDisk, Request, bytes, bytes], bytes]) -> Any:
    """Return a lie that changes the data of a read: `change` gets these, and what the pages had before."""

    def lie(disk: LyingDisk, request: Request, before: bytes) -> bool:
        if request.op != Op.READ:
            return False
        data = b"".join(request.iov)
        changed = change(disk, request, data, before)
        place = 0
        for view in request.iov:
            view[:] = changed[place : place + len(view)]
            place += len(view)
        return changed != data

    return lie


def stale(disk: LyingDisk, request: Request, data: bytes, _before: bytes) -> bytes:
    """Return what the first sector held before it was written last."""
    return disk.former.get(request.offset, data[:SECTOR]) + data[SECTOR:]


def untouched(_disk: LyingDisk, _request: Request, data: bytes, before: bytes) -> bytes:
    """Return all but the last bytes, which stay what they were in the page."""
    return data[:-16] + before[-16:]


def of_another_disk(_disk: LyingDisk, _request: Request, data: bytes, _before: bytes) -> bytes:
    """Return what a guest with another seed would have written."""
    return data[:8] + bytes([data[8] ^ 1]) + data[9:]


LIES = {
    "a lost write": lose_write,
    "a torn write": tear_write,
    "a sector beyond a write": write_next_sector_too,
    "swapped sectors": swap_sectors,
    "a write that is done again": repeat_write,
    "a stale read": change_answer(stale),
    "a read that leaves bytes": change_answer(untouched),
    "a sector of another disk": change_answer(of_another_disk),
    "swapped answers": change_answer(lambda _d, _r, data, _b: data[SECTOR:] + data[:SECTOR]),
    "zeros": change_answer(lambda _d, _r, data, _b: bytes(len(data))),
}


class Machine:
    """A guest with one disk, and its loads."""

    def __init__(self, directory: Path, disk: LyingDisk, wishes: Wishes, policy: str = "") -> None:
        geometry = Geometry(size=SIZE, can_discard=not disk._lie, discard_granularity=SECTOR)
        self.served = Served(directory, disk, geometry)
        self.served.policy = policy
        self.frontend = self.served.connect(wishes)
        self.model = make_model(3, SIZE // SECTOR, can_discard=self.frontend.facts.can_discard)
        self.rings = FullRings(self.frontend, self.model)
        self.wide = FullRings(self.frontend, self.model, pages=5, most_writes=0.5)
        self.load = Load(self.frontend, self.model)

    def run(self, load: str, requests: int) -> None:
        """Do so many requests or a few more. Raises: WrongData, BackendMisbehaved."""
        if load == "all kinds":
            self.load.run(requests)
            self.load.finish()
        else:
            rings = self.rings if load == "full rings" else self.wide
            rings.run(-(-requests // self.frontend.rings[0].ring.size // len(self.frontend.rings)))

    def run_and_read_all(self, load: str, requests: int) -> None:
        """Do so many requests or a few more, and read the whole disk. Raises: WrongData, BackendMisbehaved."""
        self.run(load, requests)
        read_all(self.frontend, self.model)

    def lie_in_ring(self, lie: Callable[[Any, int, tuple[int, int, int]], None]) -> None:
        """Have one response made by `lie`, which gets the ring's bytes, the place there, and what is to be written."""
        rings = [queue.ring for queue in self.served.engine.queues]
        right = [ring.write_response for ring in rings]

        def write(pages: Any, place: int, *answer: int) -> None:
            for ring, usual in zip(rings, right, strict=True):
                ring.write_response = usual
            right[0](pages, place, *answer)
            lie(pages, place, answer)

        for ring in rings:
            ring.write_response = write

    def answer_in_parts(self, lie: Callable[[Machine, Callable[[], None]], Call | None]) -> None:
        """Have the disk give back half of what it has at a time, and the guest look in between.

        `lie` has the disk do that, and returns what comes later than the answers: before the next ones, and after the
        guest has looked.
        """
        disk, later = self.served.disk, list[Call]()
        disk.holding = True

        def idle(_timeout_s: float) -> None:
            self.served.step()
            while later:
                later.pop()()
            if len(disk.held) > 1:
                late = lie(self, partial(disk.give_back, disk.held[: len(disk.held) // 2]))
                later.extend([late] if late else [])
            elif disk.held:
                disk.give_back()

        self.frontend._idle = idle

    def pages(self) -> dict[int, memoryview]:
        """Return the pages for data that are granted now, by their grants."""
        ring, guest = {*self.frontend.rings[0].grefs}, self.served.guest
        granted = {gref: entry for gref, entry in enumerate(guest.table.entries.tolist()) if entry and gref not in ring}
        return {gref: guest.page(entry >> 32) for gref, entry in granted.items()}


each_grants = pytest.mark.parametrize("persistent", [False, True], ids=["granted anew", "persistent"])
each_load = pytest.mark.parametrize("load", ["full rings", "several pages", "all kinds"])


@each_load
@each_grants
@pytest.mark.parametrize("lie", LIES)
def test_a_disk_that_lies_is_noticed(tmp_path: Path, load: str, lie: str, *, persistent: bool) -> None:
    """Wrong data end a run: at the read that returns them, or at the latest when the whole disk is read."""
    disk = LyingDisk(LIES[lie])
    machine = Machine(tmp_path, disk, Wishes(persistent=persistent))
    with machine.served, pytest.raises(WrongData):
        machine.run_and_read_all(load, 3 * SOON)

    assert disk.lies


@each_load
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wishes", [{}, {"queues": 2, "persistent": True}, {"ring_order": 2}], ids=str)
def test_the_truth_is_accepted(tmp_path: Path, load: str, layout: str, wishes: dict[str, Any]) -> None:
    """A disk that does as it is told passes, and so it does if loads take turns."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes(layout=LAYOUTS[layout], **wishes))
    with machine.served:
        for each in (load, "full rings", load, "all kinds"):
            machine.run(each, SOON)
        read_all(machine.frontend, machine.model)

    for rings in [machine.rings, *[machine.wide] * (load == "several pages")]:
        assert rings.begun == rings.finished == rings.settled >= SOON
    assert 0 == machine.model.failures
    assert machine.model.verified > 3 * SOON
    assert {"READ", "WRITE", "DISCARD", "FLUSH"} <= set(machine.served.disk.seen)


def pad(pages: Any, place: int, _answer: tuple[int, int, int]) -> None:
    """Leave a byte in the padding."""
    pages[place + 9] = 1


def other(pages: Any, place: int, answer: tuple[int, int, int]) -> None:
    """Give the answer to another request."""
    pages[place] = answer[0] ^ 1


def none(pages: Any, place: int, _answer: tuple[int, int, int]) -> None:
    """Give an answer to no request."""
    pages[place + 6] = 1


def operation(pages: Any, place: int, answer: tuple[int, int, int]) -> None:
    """Give another operation."""
    pages[place + 8] = answer[1] ^ 1


@each_load
@pytest.mark.parametrize("lie", [pad, other, none, operation], ids=lambda lie: lie.__name__)
def test_a_wrong_response_is_noticed(tmp_path: Path, load: str, lie: Any) -> None:
    """One response with padding, or to another request than it should be, ends a run: no request is answered twice."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes())
    with machine.served:
        machine.run(load, SOON)
        machine.lie_in_ring(lie)
        with pytest.raises(BackendMisbehaved, match="response"):
            machine.run(load, SOON)


def data_later(machine: Machine, give_back: Call) -> Call | None:
    """Answer a read before its data are in the guest's page."""
    pages = machine.pages()
    before = {gref: bytes(page) for gref, page in pages.items()}
    give_back()
    for gref, page in pages.items():
        if page != before[gref]:
            data = bytes(page)
            page[:] = before[gref]
            return partial(page.__setitem__, slice(None), data)
    return None


def unmapped_later(machine: Machine, give_back: Call) -> Call:
    """Answer before the grants are given back."""
    table, grefs = machine.served.guest.table, [*machine.pages()]
    give_back()
    for gref in grefs:
        table.mark(gref, GTF_READING)
    return lambda: [table.mark(gref, 0) for gref in grefs]


def written_later(machine: Machine, give_back: Call) -> Call:
    """Raise the producer index before the response is in its slot."""
    ring = machine.served.engine.queues[0].ring
    start = ring.places[ring.answered % ring.size]
    slot = ring.pages[start : start + ring.layout.response.size]
    before = bytes(slot)
    give_back()
    response = bytes(slot)
    slot[:] = before
    return partial(slot.__setitem__, slice(None), response)


@each_load
@pytest.mark.parametrize(
    ("lie", "persistent", "error", "problem"),
    [
        (data_later, False, WrongData, r"foreign bytes \(a5a5"),
        (data_later, True, WrongData, r"foreign bytes \(a5a5"),
        (unmapped_later, False, BackendMisbehaved, "still mapped"),
        (written_later, False, BackendMisbehaved, "a response "),
    ],
)
def test_an_answer_that_comes_too_early_is_noticed(
    tmp_path: Path, load: str, lie: Any, error: type[Exception], problem: str, *, persistent: bool
) -> None:
    """An answer comes after its bytes, its data and the end of its mappings: a run ends even if they follow soon."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes(persistent=persistent))
    with machine.served:
        machine.run(load, SOON)
        machine.answer_in_parts(lie)
        with pytest.raises(error, match=problem):
            machine.run(load, 2 * SOON)


@each_load
@each_grants
def test_answers_in_parts_are_accepted(tmp_path: Path, load: str, *, persistent: bool) -> None:
    """A disk that tells the truth passes, however few answers come at a time."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes(persistent=persistent))
    with machine.served:
        machine.answer_in_parts(lambda _machine, give_back: give_back())
        machine.run_and_read_all(load, 2 * SOON)

    assert 0 == machine.model.failures
    assert machine.model.verified > SOON


@each_load
def test_a_response_too_many_is_noticed(tmp_path: Path, load: str) -> None:
    """More responses than there were requests end a run."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes())
    with machine.served:
        machine.run(load, SOON)
        machine.frontend.rings[0].ring.index[RSP_PROD] += 1
        with pytest.raises(BackendMisbehaved, match="1 responses to 0 requests"):
            {"full rings": machine.rings, "several pages": machine.wide, "all kinds": machine.load}[load].take()


@each_load
def test_a_page_that_stays_mapped_is_noticed(tmp_path: Path, load: str) -> None:
    """A grant that is given back must not be in use any more."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes())
    ring, table = {*machine.frontend.rings[0].grefs}, machine.served.guest.table

    def keep(_pages: Any, _place: int, _answer: tuple[int, int, int]) -> None:
        for gref, entry in enumerate(table.entries.tolist()):
            if entry and gref not in ring:
                table.mark(gref, GTF_READING)

    with machine.served:
        machine.lie_in_ring(keep)
        with pytest.raises(BackendMisbehaved, match="still mapped"):
            machine.run(load, SOON)


@each_load
def test_errors_are_counted_and_no_end(tmp_path: Path, load: str) -> None:
    """Requests that fail are counted; what a failed write may have left is accepted afterwards, and nothing else."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes(), "read=report")
    with machine.served:
        for op in (Op.READ, Op.WRITE):
            machine.served.disk.errors = {op: 5}
            machine.run(load, SOON // 10)
            assert machine.model.failures
            machine.model.failures = 0
        machine.served.disk.errors = {}
        machine.run_and_read_all(load, SOON)

    assert 0 == machine.model.failures


def test_rings_are_filled_before_other_requests(tmp_path: Path) -> None:
    """Pages that are not adjacent are refused, since they could not be filled at once; so is a disk with too few."""
    machine = Machine(tmp_path, LyingDisk(None), Wishes())
    with machine.served:
        guest = machine.served.guest
        frames = guest.allocate(3)
        for frame in (1, 0, 2):
            guest.free([frames[frame]])
        with pytest.raises(ValueError, match="not adjacent"):
            FullRings(machine.frontend, machine.model)
        with pytest.raises(ValueError, match="248 sectors are not enough for 32"):
            FullRings(machine.frontend, make_model(3, 31 * 8))


@pytest.fixture
def known() -> KnownDisk:
    """A disk of 64 sectors."""
    return make_model(3, 64)


def test_likely_contents_are_not_the_only_ones(known: KnownDisk) -> None:
    """After a failed write or a discard, the old data and the new ones are accepted, in any order, and no others."""
    step = partial(known.step, BLKIF_OP_WRITE, 8, 8)
    first, second, third = step(), step(), step()
    known.finish(first, 0)
    known.finish(second, -1)
    for data in (first.data, second.data, first.data):
        known.check(8, data)
    with pytest.raises(WrongData, match="sector 8 holds generation 3 where generation 1 or generation 2 belongs"):
        known.check(8, third.data)
    known.finish(third, 0)
    known.check(8, third.data)
    known.finish(Step(5, 8, 8), 0)
    for data in (bytes(8 * SECTOR), third.data, bytes(8 * SECTOR)):
        known.check(8, data)
    with pytest.raises(WrongData, match="generation 1 where"):
        known.check(8, first.data)
