"""Whether two chains read the same; what neither has is not read.

Must not write, nor keep more of a disk in memory than a few pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from xenbackend.block.extents import Extent
from xenbackend.block.mapped.parts import allocate
from xenbackend.block.request import Op, Request
from xenbackend.block.spec import ChainSpec
from xenbackend.image.extents import map_chain
from xenbackend.image.session import Disk, Session
from xenbackend.image.transfer import DEPTH, PIECE, Piece, pieces_of

Progress = Callable[[int, int], None]  # bytes done and bytes in all; may raise, to stop


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
        pairs = [_Pair() for _ in range(DEPTH // 2)]
        total = max(sizes)
        progress(0, total)
        pieces = pieces_of(_to_look_at(*(map_chain(disk.chain.layers, all_holes=True) for disk in disks)))
        while batch := list(islice(pieces, len(pairs))):
            used = pairs[: len(batch)]
            for disk, side in zip(disks, (0, 1), strict=True):
                reads = [pair.read(side, piece, disk) for pair, piece in zip(used, batch, strict=True)]
                session.do(disk, *(read for read in reads if read))
            for pair, piece in zip(used, batch, strict=True):
                place = pair.first_difference(piece)
                if place is not None:
                    return Compared(sizes, piece.offset + place)
            progress(batch[-1].end, total)
        progress(total, total)
        return Compared(sizes, None)


class _Pair:
    """Memory for a piece of both disks."""

    def __init__(self) -> None:
        self._memory = allocate(PIECE), allocate(PIECE)

    def read(self, side: int, piece: Piece, disk: Disk) -> Request | None:
        """Return the request that reads a piece of a disk, None where all of it is behind the end, and zeros."""
        view = self._memory[side][: piece.length]
        length = max(0, min(piece.end, disk.size) - piece.offset)
        view[length:] = bytes(piece.length - length)
        if not length:
            return None
        request = Request()
        request.op, request.offset, request.length, request.iov = Op.READ, piece.offset, length, [view[:length]]
        return request

    def first_difference(self, piece: Piece) -> int | None:
        """Return the first byte that is not the same."""
        one, other = (bytes(memory[: piece.length]) for memory in self._memory)
        if one == other:
            return None
        low, high = 0, piece.length  # it is in between
        while high - low > 1:
            middle = (low + high) // 2
            if one[low:middle] == other[low:middle]:
                low = middle
            else:
                high = middle
        return low


def _to_look_at(one: Iterable[Extent], other: Iterable[Extent]) -> Iterator[Extent]:
    """Yield the ranges in which either disk may have something."""
    todo = [iter(one), iter(other)]
    current = [next(each, None) for each in todo]
    place = 0
    while any(current):
        ends = [each.end for each in current if each]
        stop = min(ends)
        filled = next((each for each in current if each and not each.is_zeros), None)
        if filled and stop > place:
            yield Extent(place, stop - place, filled.kind)
        place = stop
        current = [
            next(source, None) if each and each.end <= stop else each
            for each, source in zip(current, todo, strict=True)
        ]
