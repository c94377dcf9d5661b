"""Whether two chains read the same; what neither has is not read.

Must not write, nor go on when it knows the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.block.spec import ChainSpec
from xenbackend.image.extents import map_chain
from xenbackend.image.pairs import read_pairs, where_either
from xenbackend.image.session import Progress, Session


@dataclass(frozen=True, slots=True)
class Compared:
    """What was found. Sizes and places are bytes; zeros behind the smaller disk's end are no difference in content."""

    sizes: tuple[int, int]
    differs_at: int | None  # the first byte that is not the same

    def is_same(self, *, strict: bool) -> bool:
        """Return whether they are the same: in content, and where `strict` in size too."""
        return self.differs_at is None and not (strict and self.sizes[0] != self.sizes[1])


def compare(first: ChainSpec, second: ChainSpec, progress: Progress, *, direct: bool = False) -> Compared:
    """Compare what two chains read as, up to the first difference.

    Raises: DriverError, where one cannot be opened, or somebody writes to it; RequestFailed, where one cannot be read.
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
    """Return the first byte that is not the same in two pieces of one length."""
    if one == other:
        return None
    low, high = 0, len(one)  # it is in between
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
