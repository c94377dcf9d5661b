"""Tests of `xenbackend.block.rbd.changed`: ranges of bytes become whole sectors, compared with a model of each byte."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from xenbackend.block.extents import Extent, Kind
from xenbackend.block.rbd.changed import extents_of

SECTOR = 512
DATA, ZERO, ABSENT = Kind.DATA, Kind.ZERO, Kind.ABSENT


def kinds(extents: list[Extent], start: int, end: int) -> list[Kind]:
    """Return the kind of each sector. The extents must be contiguous from `start` to `end`."""
    assert start == extents[0].start
    assert end == extents[-1].end
    assert all(before.end == after.start for before, after in pairwise(extents))
    return [each.kind for each in extents for _ in range(each.start, each.end, SECTOR)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], [ABSENT] * 4),
        ([(0, 2048, False)], [ZERO] * 4),
        ([(100, 1948, False)], [DATA, ZERO, ZERO, ZERO]),
        ([(512, 1000, False)], [ABSENT, ZERO, DATA, ABSENT]),
        ([(600, 100, False)], [ABSENT, DATA, ABSENT, ABSENT]),
        ([(600, 100, True)], [ABSENT, DATA, ABSENT, ABSENT]),
        ([(0, 600, False), (600, 424, True)], [ZERO, DATA, ABSENT, ABSENT]),
        ([(0, 600, True), (600, 1448, False)], [DATA, DATA, ZERO, ZERO]),
        ([(1024, 512, True), (0, 512, True)], [DATA, ABSENT, DATA, ABSENT]),
        ([(512, 512, True), (0, 2048, False)], [ZERO, DATA, ZERO, ZERO]),
    ],
)
def test_a_sector_in_part_is_data(found: list[tuple[int, int, bool]], expected: list[Kind]) -> None:
    """A sector that is only partly zeros, or partly unchanged, is reported as data. Ranges may come in any order."""
    assert expected == kinds(list(extents_of(found, 0, 2048, ABSENT)), 0, 2048)


@pytest.mark.parametrize("gaps", [ABSENT, ZERO])
def test_against_a_model_of_each_byte(gaps: Kind, request: pytest.FixtureRequest) -> None:
    """A sector is zeros, or unchanged, only if all of its bytes are. A sector that no range touches is never data."""
    random = Random(request.config.getoption("--seed"))
    for _ in range(500):
        start, size = 64 * SECTOR, random.randrange(1, 12 * SECTOR)
        end = start + size
        cuts = sorted({start, end, *(start + random.choice((1, 64, SECTOR)) * number for number in range(9))} - {end})
        cuts = [*[each for each in cuts if each < end], end]
        found, model = [], [gaps] * size
        for first, last in pairwise(cuts):
            if kind := random.choice((None, DATA, ZERO)):
                found.append((first, last - first, kind is DATA))
                model[first - start : last - start] = [kind] * (last - first)
        random.shuffle(found)
        told = kinds(list(extents_of(found, start, end, gaps)), start, end)
        for number, kind in enumerate(told):
            truth = set(model[number * SECTOR : (number + 1) * SECTOR])
            assert truth == {kind} or kind is DATA
            if truth == {gaps}:
                is_touched = any(
                    first < start + (number + 1) * SECTOR and first + length > start + number * SECTOR
                    for first, length, _ in found
                )
                assert is_touched or kind is gaps


def test_what_is_outside_does_not_count() -> None:
    """A range that extends beyond the one asked about is cut."""
    assert [ZERO, ZERO] == kinds(list(extents_of([(0, 4096, False)], 1024, 2048, ABSENT)), 1024, 2048)
