"""What both versions of QCOW have in common: opening, the parent, compressed clusters, first writes to clusters.

Must not know where a version keeps its tables, nor how it tracks free clusters.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from xenbackend.block.driver import File, ParentRef
from xenbackend.block.extents import Extent, of_entries, with_holes
from xenbackend.block.formats.qcow2 import Region
from xenbackend.block.formats.qcow2_tables import Unpack, inflate, unpack_table
from xenbackend.block.formats.table import BY_QEMU_NAME, QemuName
from xenbackend.block.mapped.disk import ChildOptions, MappedDisk
from xenbackend.block.mapped.inflated import Inflated
from xenbackend.block.mapped.parents import PARENT, find_named, is_file_name, parent_ref
from xenbackend.block.mapped.shared import Then
from xenbackend.block.mapped.tables import Tables
from xenbackend.block.options import option
from xenbackend.block.qcow.codec import Version1, Version2
from xenbackend.block.qcow.copyup import CopyUp, Reserve
from xenbackend.block.qcow.level2 import Allocator, L1Table, L2Table, Mapping
from xenbackend.block.request import Request
from xenbackend.errors import DriverError, printable
from xenbackend.units import SECTOR, round_up

TABLES = 16 << 20  # bytes of L2 tables in memory; they take up to twice that
_TABLE_EXTRA = 1024  # bytes that a table takes in addition to its words and entries


class QcowDisk(MappedDisk):
    """The base of `qcow:` and `qcow2:`."""

    @dataclass(frozen=True, slots=True)
    class Options(ChildOptions):
        """The options of `qcow:`."""

        parent_format: QemuName = option("format of the parent, if the image does not say", default="")

    options: Options
    step = 64 * 1024  # suits the sectors of any medium
    allocator: Allocator | None = None

    def serve(
        self,
        file: File,
        size: int,
        cluster_bits: int,
        l1: Region,
        codec: Version1 | Version2,
        unpack: Unpack = inflate,
        data: File | None = None,
    ) -> None:
        """Prepare for serving; for a writable disk call `serve_writes` afterwards."""
        self._codec = codec
        self._unpack = partial(unpack, cluster_size=1 << cluster_bits)
        table_bytes = 2 * 8 << codec.l2_bits  # the entries, and the file's words
        tables: Tables[L2Table] = Tables(TABLES // (table_bytes + _TABLE_EXTRA))
        # `Tables` is not covariant; only this class adds to it.
        bits = codec.l2_bits
        self.start(file, size, cluster_bits=cluster_bits, table_bits=bits, tables=tables, data=data)  # type: ignore[arg-type]  # two kinds of tables
        first = l1.offset // SECTOR * SECTOR
        length = round_up(l1.offset + l1.length, SECTOR) - first
        sectors = file.read_at(first, length)
        self._l1_entries = l1.length // 8
        self._l1 = L1Table(l1.offset, sectors + bytes(length - len(sectors)), self.io.write_meta, self.io.soon)
        self._mapping = Mapping(self.io, codec, cluster_bits, self._l1, tables)
        self._inflated = Inflated(self.io, cluster_bits)

    def l1_words(self) -> array[int]:
        """Return the words of the L1 table."""
        return self._l1.words(self._l1_entries)

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:
        """See `Driver`."""
        found = self._cluster_extents(size)
        return with_holes(found, self.io.data) if all_holes or self.is_preallocated() else found

    def is_preallocated(self) -> bool:
        """Return whether the image seems to have been preallocated: made with room for data that are not there yet."""
        return False

    def _cluster_extents(self, size: int) -> Iterator[Extent]:
        cluster, per_table = 1 << self.cluster_bits, 1 << self._codec.l2_bits
        span = cluster * per_table
        for start, word in zip(range(0, size, span), self.l1_words(), strict=False):
            table, _ = self._codec.decode_l1(word)
            entries: Sequence[int] = array("Q", bytes(8 * per_table))
            if table:
                data = self.file.read_at(table, 8 * per_table)
                entries = self._codec.map_l2(unpack_table(data + bytes(8 * per_table - len(data))))
            yield from of_entries(entries, cluster, start, size)

    def serve_writes(self, allocator: Allocator, reserve: Reserve | None = None) -> None:
        """Allow writes; to be called after `serve`.

        Args:
            allocator: finds room in the image for tables and clusters.
            reserve: finds room for clusters in the external data file, if there is one.
        """
        with suppress(OSError):  # a block device cannot grow; a write beyond its end will fail
            self.file.grow(round_up(self.file.size, 1 << self.cluster_bits))
        self.allocator = allocator
        self._mapping.allocator = allocator
        self._copyup = CopyUp(
            self,
            self._mapping,
            reserve or (lambda _first, count, then: allocator.reserve(count, then)),
            self._codec.l2_bits,
            self._reaches_parent,
        )

    def load_table(self, number: int, then: Then) -> None:
        """See `MappedDisk`."""
        self._mapping.load(number, then)

    def write_elsewhere(self, request: Request) -> None:
        """See `MappedDisk`."""
        self._copyup.write(request)

    def read_special(self, request: Request) -> None:
        """See `MappedDisk`. The cluster is compressed."""
        cluster = request.offset >> self.cluster_bits
        number, index = divmod(cluster, 1 << self._codec.l2_bits)
        table: Any = self.tables.find(number)
        word = table.words[index]
        region = self._codec.compressed_place(word)
        self._inflated.read(request, word, region.offset, region.length, self._unpack)

    def find_parent(self, name: bytes, image_format: str) -> ParentRef:
        """Return the parent that the image names. Raises: DriverError if it cannot or must not be opened."""
        options, path = self.options, os.fsdecode(name)
        parent_format = image_format or options.parent_format
        known = ", ".join(BY_QEMU_NAME)
        if not is_file_name(path):
            raise DriverError(f"its parent {printable(path)!r} is not a file; give it another one with qemu-img rebase")
        if not parent_format:
            problem = f"it does not say of which format its parent {printable(path)!r} is, and that is never guessed"
            raise DriverError(f"{problem}; say parent_format={known}")
        if parent_format not in BY_QEMU_NAME:
            raise DriverError(f"its parent is of the format {printable(parent_format)!r}, which is not one of {known}")
        row = BY_QEMU_NAME[parent_format]
        more = {name: getattr(options, name, "") for name in row.passes_on}
        more["cache"] = "on" if options.cache else ""
        return parent_ref(row.driver, find_named(self, PARENT, [path]), **more)

    def _reaches_parent(self, offset: int) -> bool:
        return offset < self._parent_size
