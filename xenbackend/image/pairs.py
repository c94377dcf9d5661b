"""Reads the same piece of two disks side by side into memory.

Must not write, nor decide what is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from xenbackend.block.extents import Extent
from xenbackend.block.mapped.parts import allocate
from xenbackend.block.request import Op, Request
from xenbackend.image.session import Disk, Session, request_for
from xenbackend.image.transfer import DEPTH, PIECE, Piece, pieces_of


def read_pairs(
    session: Session, one: Disk, other: Disk | None, extents: Iterable[Extent]
) -> Iterator[tuple[Piece, memoryview, memoryview]]:
    """Yield each piece with its bytes on both disks. Beyond the end of a disk, and if there is no disk, they are zeros.

    The memory of a piece is reused when the next one is asked for.

    Raises: RequestFailed if one cannot be read.
    """
    pieces = pieces_of(extents)
    memory = [(allocate(PIECE), allocate(PIECE)) for _ in range(DEPTH // 2)]
    while batch := list(islice(pieces, len(memory))):
        for disk, side in ((one, 0), (other, 1)):
            reads = [
                _read(disk.size if disk else 0, views[side], piece) for piece, views in zip(batch, memory, strict=False)
            ]
            if disk:
                session.do(disk, *(read for read in reads if read.length))
        for piece, (mine, theirs) in zip(batch, memory, strict=False):
            yield piece, mine[: piece.length], theirs[: piece.length]


def where_either(one: Iterable[Extent], other: Iterable[Extent]) -> Iterator[Extent]:
    """Yield the ranges in which either of two disks may have other data than zeros."""
    todo = [iter(one), iter(other)]
    current = [next(each, None) for each in todo]
    place = 0
    while any(current):
        stop = min(each.end for each in current if each)
        filled = next((each for each in current if each and not each.is_zeros), None)
        if filled and stop > place:
            yield Extent(place, stop - place, filled.kind)
        place = stop
        current = [
            next(source, None) if each and each.end <= stop else each
            for each, source in zip(current, todo, strict=True)
        ]


def _read(size: int, memory: memoryview, piece: Piece) -> Request:
    """Return a read of as much of a piece as a disk of `size` bytes has; the rest of the memory is zeroed at once."""
    length = max(0, min(piece.end, size) - piece.offset)
    memory[length : piece.length] = bytes(piece.length - length)
    return request_for(Op.READ, piece.offset, memory[:length])
