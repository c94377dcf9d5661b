"""The base of drivers for other hypervisors' image formats, which are read and never written.

Must not know a format, nor open the file for writing.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from functools import partial

from xenbackend.block.driver import Env, File, Geometry
from xenbackend.block.extents import Extent, of_entries, with_holes
from xenbackend.block.formats.layout import Layout
from xenbackend.block.mapped.disk import MappedDisk
from xenbackend.block.mapped.shared import Then
from xenbackend.block.mapped.tables import Table, Tables
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR, round_up

_TABLES = 8 << 20  # bytes that tables in memory take, up to twice that
_TABLE_EXTRA = 256  # bytes that a table takes beside its entries


class ForeignDisk(MappedDisk):
    """A read-only mapped disk. A subclass implements `parse`, and everything else is done here."""

    step = 64 * 1024  # the file may end anywhere
    image: Layout
    is_preallocated = False  # whether the image was made with room for the whole disk

    def parse(self, env: Env, file: File) -> Layout:
        """Return the layout of the image, and report its format. Raises: DriverError, OSError.

        If the disk cannot be read directly from `file`, this replaces `self.file`; the replacement has to close `file`.
        """
        raise NotImplementedError

    def open_file(self, env: Env, path: str = "", *, read_only: bool = True) -> File:
        """See `MappedDisk`."""
        return super().open_file(env, path, read_only=read_only)

    def open_image(self, env: Env, file: File) -> Geometry:
        """See `MappedDisk`."""
        self.image = self.parse(env, file)
        shape = self.image.shape
        tables: Tables[Table] = Tables(_TABLES // ((8 << shape.table_bits) + _TABLE_EXTRA))
        self.start(self.file, shape.size, cluster_bits=shape.cluster_bits, table_bits=shape.table_bits, tables=tables)
        return Geometry(shape.size, shape.sector_size, True, physical_sector_size=shape.physical_sector_size)

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:
        """See `Driver`."""
        found = self.table_extents(size)
        return with_holes(found, self.file) if all_holes or self.is_preallocated else found

    def table_extents(self, size: int) -> Iterator[Extent]:
        """Yield the extents according to the tables, blocking. Raises: DriverError, OSError."""
        shape = self.image.shape
        cluster = 1 << shape.cluster_bits
        for number in range(shape.tables):
            start = number << shape.cluster_bits + shape.table_bits
            yield from of_entries(self.read_table(number), cluster, start, size)

    def read_table(self, number: int) -> array[int]:
        """Return a table, blocking. Raises: DriverError, OSError."""
        place, length = self.image.table_at(number)
        return self.image.decode(self.file.read_at(place, length)) if length else self._empty()

    def load_table(self, number: int, then: Then) -> None:
        """See `MappedDisk`."""
        place, length = self.image.table_at(number)
        if length:
            first = place // SECTOR * SECTOR
            got = partial(self._decode, number, place - first, length, then)
            self.io.read_meta(first, round_up(place + length, SECTOR) - first, got)
        else:
            self.io.soon(partial(self._put, number, self._empty(), then))

    def write_elsewhere(self, request: Request) -> None:
        """Refuse to write. No layer above does that, since the geometry says read-only."""
        self.io.finish(request, errno.EROFS)

    def _decode(self, number: int, skip: int, length: int, then: Then, status: int, data: memoryview) -> None:
        if status:
            then(status)
            return
        try:
            table = self.image.decode(bytes(data[skip : skip + length]))
        except DriverError:
            then(errno.EIO)
            return
        self._put(number, table, then)

    def _put(self, number: int, table: array[int], then: Then) -> None:
        self.tables.put(number, table)
        then(0)

    def _empty(self) -> array[int]:
        return array("Q", bytes(8 << self.image.shape.table_bits))
