"""A VMDK disk made of extents: makes the tables of the disk from those of its extents.

Must not read a file: it says which bytes it needs, and the caller reads them. Places are those of `mapped.joined`, in
which every file of the disk has a base.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from xenbackend.block.formats.common import damaged
from xenbackend.block.formats.layout import Shape
from xenbackend.block.formats.vmdk import Image
from xenbackend.block.formats.vmdk_descriptor import Descriptor
from xenbackend.block.mapped.tables import PLACE, READABLE, ZERO
from xenbackend.errors import DriverError

_MAX_CLUSTER_BITS = 20  # of a disk whose extents are all flat
_TABLE_BITS = 9


@dataclass(frozen=True, slots=True)
class Piece:
    """An extent that was opened. Numbers are in bytes."""

    start: int  # on the disk
    length: int
    base: int  # where its file, or its part of the file, begins; meaningless for zeros
    image: Image | None = None  # of a sparse extent
    is_zeros: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """A part of an extent's table that is needed for a table of the disk: a range of the files."""

    place: int  # in bytes, in the joined files
    length: int
    piece: Piece
    first: int  # the first cluster of the disk that it is about


class Disk:
    """The extents of a disk, in order. Raises: DriverError if they do not fit together."""

    def __init__(self, pieces: Sequence[Piece], descriptor: Descriptor) -> None:
        self.pieces = pieces
        self.descriptor = descriptor
        self.is_compressed = any(each.image is not None and each.image.is_compressed for each in pieces)
        self._starts = [each.start for each in pieces]
        bits, table_bits = _division(pieces)
        size = sum(each.length for each in pieces)
        self.shape = Shape(size, bits, table_bits, 0)

    def piece_at(self, offset: int) -> Piece:
        """Return the extent that has the byte at `offset` of the disk."""
        return self.pieces[bisect_right(self._starts, offset) - 1]

    def needs(self, number: int) -> list[Need]:
        """Return the parts of extents' tables that a table of the disk is made of."""
        bits = self.shape.cluster_bits
        first, end = self._clusters(number)
        needs = []
        for piece in self._within(first, end):
            image, start = piece.image, piece.start >> bits
            if image is None:
                continue
            low, high = max(first, start) - start, min(end, self._end(piece)) - start
            for table in range(low >> image.shape.table_bits, (high - 1 >> image.shape.table_bits) + 1):
                from_, to = max(low, table << image.shape.table_bits), min(high, table + 1 << image.shape.table_bits)
                place, length = image.table_at(table)
                if length:
                    skip = 4 * (from_ - (table << image.shape.table_bits))
                    needs.append(Need(piece.base + place + skip, 4 * (to - from_), piece, start + from_))
        return needs

    def table(self, number: int, data: Sequence[bytes]) -> array[int]:
        """Return the entries of a table, as in `mapped.tables`. Raises: DriverError.

        Args:
            number: the table's.
            data: the bytes of each of its `needs`, in the same order.
        """
        first, end = self._clusters(number)
        bits = self.shape.cluster_bits
        table = array("Q", bytes(8 << self.shape.table_bits))
        for piece in self._within(first, end):
            if piece.image is None:
                low, high = max(first, piece.start >> bits), min(end, self._end(piece))
                base = piece.base - piece.start | READABLE
                words = (ZERO if piece.is_zeros else (each << bits) + base for each in range(low, high))
                table[low - first : high - first] = array("Q", words)
        for need, found in zip(self.needs(number), data, strict=True):
            assert need.piece.image is not None  # noqa: S101 - other pieces have no needs
            entries, base = need.piece.image.decode(found), need.piece.base
            if base:
                entries = array("Q", [each + base if each & PLACE else each for each in entries])
            table[need.first - first : need.first - first + len(entries)] = entries
        return table

    def _clusters(self, number: int) -> tuple[int, int]:
        """Return the first cluster of a table, and the one after the last that the disk has."""
        first = number << self.shape.table_bits
        return first, min(first + (1 << self.shape.table_bits), -(-self.shape.size >> self.shape.cluster_bits))

    def _within(self, first: int, end: int) -> Sequence[Piece]:
        bits = self.shape.cluster_bits
        low = bisect_right(self._starts, first << bits) - 1
        return self.pieces[low : bisect_right(self._starts, (end << bits) - 1)]

    def _end(self, piece: Piece) -> int:
        return -(-(piece.start + piece.length) >> self.shape.cluster_bits)


def _division(pieces: Sequence[Piece]) -> tuple[int, int]:
    """Return `cluster_bits` and `table_bits` for the disk. Raises: DriverError."""
    images = [each.image for each in pieces if each.image is not None]
    odd = 1 << _MAX_CLUSTER_BITS
    for piece in pieces:
        odd |= piece.start
        if piece.image is not None and piece.length > piece.image.shape.size:
            problem = f"an extent of {piece.length} bytes is in a file for {piece.image.shape.size}"
            raise damaged(problem)
    aligned = (odd & -odd).bit_length() - 1
    if not images:
        return aligned, _TABLE_BITS
    bits, table_bits = images[0].shape.cluster_bits, max(each.shape.table_bits for each in images)
    if any(each.shape.cluster_bits != bits for each in images) or aligned < bits:
        raise DriverError(
            "its sparse extents have grains of several sizes, or begin inside of one; make one file of the disk with "
            "qemu-img convert -O vmdk"
        )
    return bits, table_bits
