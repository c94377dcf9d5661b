"""A range of a layer as a disk of its own."""

from __future__ import annotations

import pytest

from tests.helpers_block import Bottom, StepEnv, discard, flush, read, write
from xenbackend.block.driver import Geometry
from xenbackend.block.request import Op
from xenbackend.block.window import Window
from xenbackend.errors import DriverError

BELOW = Geometry(1 << 20, can_discard=True, discard_granularity=8192, discard_alignment=1024, physical_sector_size=4096)


def shown(start: int, length: int, below: Geometry = BELOW) -> tuple[Window, Geometry, Bottom, StepEnv]:
    """Return a window over a source that records what it is given."""
    window, env, bottom = Window(None), StepEnv(), Bottom()
    window.env, window.next, window.below = env, bottom, below
    return window, window.show(start, length), bottom, env


def test_requests_are_moved_and_stay_as_they_were() -> None:
    """D1: requests are moved by the start of the range on their way down, but the guest's request keeps its fields."""
    window, _, bottom, _ = shown(4096, 65536)
    back: list[object] = []
    window.complete = back.extend
    batch = [read(512, 512), write(0, bytes(1024)), discard(8192, 512), flush()]
    window.submit(list(batch))
    [passed] = bottom.batches

    assert [(4608, 512), (4096, 1024), (12288, 512), (0, 0)] == [(each.offset, each.length) for each in passed]
    assert [(512, 512), (0, 1024), (8192, 512), (0, 0)] == [(each.offset, each.length) for each in batch]
    assert all(below.iov is above.iov for below, above in zip(passed, batch, strict=True))
    for number, each in enumerate(passed):
        each.status = number
    window.on_complete(list(reversed(passed)))
    assert list(reversed(batch)) == back
    assert [0, 1, 2, 3] == [each.status for each in batch]


def test_what_goes_down_is_used_again() -> None:
    """The requests that go down are reused: a hundred batches need no more of them than one."""
    window, _, bottom, _ = shown(0, 65536)
    window.complete = lambda batch: None
    seen = set()
    for _ in range(100):
        window.submit([read(0, 512), read(512, 512)])
        passed = bottom.batches.pop()
        seen |= {id(each) for each in passed}
        for each in passed:
            each.status = 0
            assert each.op == Op.READ
        window.on_complete(passed)

    assert len(seen) == 2


def test_the_geometry_is_the_ranges() -> None:
    """Size and alignment of discards are those seen from the beginning of the range."""
    _, geometry, _, env = shown(5120, 65536)

    assert (65536, 8192, 4096) == (geometry.size, geometry.discard_granularity, geometry.discard_alignment)
    assert "begins inside a physical sector of 4096 bytes" in env.facts["alignment"]
    assert "alignment" not in shown(8192, 65536)[3].facts
    assert shown(4096, 4096, Geometry(1 << 20))[1].discard_alignment == 0


@pytest.mark.parametrize(
    ("start", "length", "problem"),
    [
        (0, 0, "the layer below has only"),
        (1 << 20, 512, "the layer below has only 1048576"),
        (4096, 1 << 20, "the disk would be bytes 4096 to 1052672"),
        (100, 512, "it would begin at byte 100, inside a sector"),
        (512, 700, "it would end at byte 1212, inside a sector"),
    ],
)
def test_what_cannot_be_a_range(start: int, length: int, problem: str) -> None:
    """A range that is empty, outside of the layer below, or not made of whole sectors is refused."""
    with pytest.raises(DriverError, match=problem):
        shown(start, length)
