"""Ranges of a disk: cut at a file's holes, made from a table's entries, and joined."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from xenbackend.block.extents import Extent, Kind, merged, of_entries, of_file, with_holes
from xenbackend.block.mapped.tables import OWNED, SPECIAL, ZERO

K = 1024


class Holey:
    """A file that has data in some ranges only."""

    def __init__(self, size: int, data: list[tuple[int, int]]) -> None:
        self.size = size
        self.data = data
        self.questions = 0

    def next_data(self, offset: int) -> tuple[int, int]:
        """See `HasHoles`."""
        self.questions += 1
        return next(((max(offset, start), end) for start, end in self.data if end > offset), (self.size, self.size))


def test_a_files_holes_are_zeros_up_to_the_end_of_the_disk() -> None:
    """A file's holes are zeros. Bytes beyond the end of the disk, such as a footer, do not count."""
    file = Holey(10 * K, [(2 * K, 4 * K), (7 * K, 10 * K)])

    assert [
        Extent(0, 2 * K, Kind.ZERO, 0),
        Extent(2 * K, 2 * K, Kind.DATA, 2 * K),
        Extent(4 * K, 3 * K, Kind.ZERO, 4 * K),
        Extent(7 * K, K, Kind.DATA, 7 * K),
    ] == list(of_file(file, 8 * K))


def test_data_are_cut_where_the_file_has_holes() -> None:
    """Data are cut at holes by their place in the file, whatever their order on the disk. Beyond the file's end is a
    hole; ranges without a place stay whole.
    """
    file = Holey(8 * K, [(2 * K, 4 * K)])
    before = [
        Extent(0, 4 * K, Kind.DATA, 3 * K),
        Extent(4 * K, 4 * K, Kind.DATA, 0),
        Extent(8 * K, K, Kind.DATA),
        Extent(9 * K, K, Kind.ZERO, 2 * K),
        Extent(10 * K, 2 * K, Kind.DATA, 7 * K),
    ]

    assert [
        Extent(0, K, Kind.DATA, 3 * K),
        Extent(K, 3 * K, Kind.DATA, 4 * K, is_hole=True),
        Extent(4 * K, 2 * K, Kind.DATA, 0, is_hole=True),
        Extent(6 * K, 2 * K, Kind.DATA, 2 * K),
        Extent(8 * K, K, Kind.DATA),
        Extent(9 * K, K, Kind.ZERO, 2 * K),
        Extent(10 * K, 2 * K, Kind.DATA, 7 * K, is_hole=True),
    ] == list(merged(with_holes(before, file)))


def test_neighbours_share_a_question() -> None:
    """For many adjacent clusters in one stretch of data the file is asked only once."""
    file = Holey(1 << 30, [(0, 1 << 30)])
    found = list(merged(with_holes((Extent(n * K, K, Kind.DATA, n * K) for n in range(1000)), file)))

    assert [Extent(0, 1000 * K, Kind.DATA, 0)] == found
    assert 1 == file.questions


@pytest.mark.parametrize("seed", range(20))
def test_holes_lose_nothing(seed: int) -> None:
    """For any file and any places, every byte is reported once, as a hole exactly if it is one in the file."""
    chance = Random(seed)
    edges = sorted(chance.sample(range(100), 20))
    file = Holey(100, list(zip(edges[::2], edges[1::2], strict=True)))
    before, start = [], 0
    for _ in range(50):
        length = chance.randint(1, 15)
        before.append(Extent(start, length, Kind.DATA, chance.randrange(110)))
        start += length
    has = {byte for first, end in file.data for byte in range(first, end)}

    found = list(with_holes(before, file))

    assert all(one.end == other.start for one, other in pairwise(found))
    assert sum(each.length for each in before) == found[-1].end
    for each in found:
        assert each.place is not None
        assert {(place in has) for place in range(each.place, each.place + each.length)} == {not each.is_hole}


def test_entries_are_ranges() -> None:
    """Adjacent clusters make one range, compressed ones have no place, and the last range ends with the disk."""
    entries = [8 * K | OWNED, 9 * K | OWNED, 20 * K | OWNED, 0, 0, ZERO, ZERO | 5 * K, SPECIAL | 3 * K, 4 * K | OWNED]

    assert [
        Extent(0, 2 * K, Kind.DATA, 8 * K),
        Extent(2 * K, K, Kind.DATA, 20 * K),
        Extent(3 * K, 2 * K, Kind.ABSENT),
        Extent(5 * K, K, Kind.ZERO),
        Extent(6 * K, K, Kind.ZERO, 5 * K),
        Extent(7 * K, K, Kind.DATA),
        Extent(8 * K, 512, Kind.DATA, 4 * K),
    ] == list(of_entries(entries, K, 0, 8 * K + 512))


def test_empty_tables_are_one_range() -> None:
    """A table without entries is absent as a whole, even if the disk ends inside of it or before it."""
    assert [Extent(4 * K, 3 * K, Kind.ABSENT)] == list(of_entries([0] * 8, K, 4 * K, 7 * K))
    assert [] == list(of_entries([0] * 8, K, 4 * K, 4 * K))
