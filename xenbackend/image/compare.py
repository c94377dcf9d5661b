"""Compares what two chains read as; ranges in which neither has data are not read.

Must not write, nor continue once the answer is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.block.spec import ChainSpec
from xenbackend.image.extents import map_chain
from xenbackend.image.pairs import read_pairs, where_either
from xenbackend.image.session import Progress, Session


@dataclass(frozen=True, slots=True)
class Compared:
    """The result. Sizes and offsets are bytes; zeros behind the end of the smaller disk are no difference."""

    sizes: tuple[int, int]
    differs_at: int | None  # the offset of the first difference

    def is_same(self, *, strict: bool) -> bool:
        """Return whether the disks have the same content and, if `strict`, the same size."""
        return self.differs_at is None and not (strict and self.sizes[0] != self.sizes[1])


def compare(first: ChainSpec, second: ChainSpec, progress: Progress, *, direct: bool = False) -> Compared:
    """Compare the disks of two chains up to the first difference.

    Raises: DriverError if one cannot be opened, or somebody writes to it; RequestFailed if one cannot be read.
    """
    with Session(direct=direct) as session:
        disks = session.open(first, read_only=True), session.open(second, read_only=True)
        sizes = disks[0].size, disks[1].size
        total = max(sizes)
        progress(0, total)
        extents = where_either(*(map_chain(disk.chain.layers, all_holes=True) for disk in disks))
        for piece, one, other in read_pairs(session, *disks, extents):
            place = _first_difference(bytes(one), bytes(other))
            if place is not None:
                return Compared(sizes, piece.offset + place)
            progress(piece.end, total)
        progress(total, total)
        return Compared(sizes, None)


def _first_difference(one: bytes, other: bytes) -> int | None:
    """Return the offset of the first difference between two pieces of the same length, None if they are equal."""
    if one == other:
        return None
    low, high = 0, len(one)  # the difference is in this range
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
