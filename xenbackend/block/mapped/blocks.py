"""The blocks of a dynamic or differencing VHD image in service: their bitmaps, and how new blocks are made.

Must not read an image's headers, nor trust a table that was not checked.

A block that has all its sectors has an ordinary entry. For a block that lacks some, a bitmap says which sectors the
image has; it is read when it is needed. A write is answered after the bitmap that marks its sectors is in the file:

    write to sectors that the block has             data -> answer
    write to other sectors                          data -> bitmap -> answer
    write to a block that is not there     block -> data -> bitmap -> answer

A new block is put beyond the end of the file, where everything is zeros. The file grows together with a new footer at
its end; then come the bitmap, a flush, and last the table's entry. A kill or a power failure in between wastes the
room, and nothing else. Without a parent the sectors hold zeros, so the new bitmap marks all of them at once. A block
device does not grow, and has arbitrary content: there the bitmaps of new blocks begin as zeros.

No block is put where the image says that something else is, such as a name of its parent beyond the end of its file,
since a guest could then write to that. In such a case nothing is done, and the requests end with IMAGE_DAMAGED.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Iterator
from functools import partial

from xenbackend.block.driver import Driver, File
from xenbackend.block.extents import Extent, Kind, with_holes
from xenbackend.block.formats.vhd import Header
from xenbackend.block.formats.vhd_tables import UNUSED, pack_bitmap, pack_entries, unpack_bitmap, used_blocks
from xenbackend.block.mapped.disk import MappedDisk
from xenbackend.block.mapped.holes import Holes
from xenbackend.block.mapped.owners import Memo
from xenbackend.block.mapped.pieces import runs_of
from xenbackend.block.mapped.shared import Once, Shared, SharedByNumber, Then
from xenbackend.block.mapped.tables import OWNED, PLACE, SPECIAL, Table, Tables
from xenbackend.block.request import IMAGE_DAMAGED, Request
from xenbackend.loop.steps import Steps, run
from xenbackend.units import PAGE, SECTOR, round_up

_BITMAPS = 8 << 20  # bytes of the bitmaps in memory, one byte for each sector; they take up to twice that
_PER_SECTOR = SECTOR // 4  # entries of the table in one sector
_TABLE_BITS = 32  # a single table has all blocks


class Bitmap:
    """Which sectors of a block the image has, one byte for each.

    `present`: as in the file's bitmap. `planned`: as the next write of that bitmap will have it.
    """

    __slots__ = ("planned", "present", "write")

    def __init__(self, present: bytearray) -> None:
        self.present = present
        self.planned = present
        self.write: Shared


class Blocks(MappedDisk):
    """See the head of this file. A driver calls `serve` when it has read and checked the headers."""

    def serve(
        self,
        file: File,
        size: int,
        header: Header,
        table: array[int],
        full: bytes,
        footer: bytes,
        taken: Iterable[tuple[int, int]],
        end: int,
    ) -> None:
        """Prepare for serving.

        Args:
            file: the image.
            size: bytes of the disk.
            header: where the table is, and how large the blocks are.
            table: the first sector of each block, or UNUSED.
            full: one byte for each block: 1 if the block is known to have all its sectors.
            footer: the footer for the end of the file.
            taken: ranges of the file, as (start, end), that the image uses for other things; also beyond its end.
            end: for a block device the end of the last block in bytes; 0 for a file.
        """
        self._header = header
        self._footer = footer
        self._device_end = end
        self._taken_behind = [each for each in taken if each[1] > (end or file.size)]
        room = header.bitmap_size
        self.entries = array("Q", bytes(8 * len(table)))
        for block in used_blocks(table):
            self.entries[block] = table[block] * SECTOR + room | (OWNED if full[block] else SPECIAL)
        tables: Tables[Table] = Tables(1)
        tables.put(0, self.entries)
        bits = header.block_size.bit_length() - 1
        self.start(file, size, cluster_bits=bits, table_bits=_TABLE_BITS, tables=tables)
        self._bitmaps: Tables[Bitmap] = Tables(_BITMAPS * SECTOR // header.block_size)
        self._inside_mask = header.block_size - 1
        self._page_owners = Memo(header.block_size // PAGE)  # owners of the pages of blocks that lack sectors
        self._holes = Holes(self)
        self._loading_bitmap: Once[Request] = Once(self.go_on)
        self._making: Once[Request] = Once(self.go_on)
        self._wanted: list[int] = []  # blocks that need a place, and for which nothing was done yet
        self._room = Shared(self._find_room, self.io.soon)
        self._places: dict[int, int] = {}  # by block: the place that was found for it
        self._coming: dict[int, int] = {}  # by block: its place, while its table entry is being written
        self._table_writes = SharedByNumber(self._write_table, self.io.soon)

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:
        """See `Driver`. Without a parent as QEMU, which ignores bitmaps: a block is there as a whole, or is zeros."""
        if all_holes:
            return with_holes(self._block_extents(size, by_sectors=True), self.file)
        return self._block_extents(size, by_sectors=self.parent is not None)

    def _block_extents(self, size: int, *, by_sectors: bool) -> Iterator[Extent]:
        block, bitmap = self._header.block_size, self._header.bitmap_size
        absent = Kind.ABSENT if self.parent else Kind.ZERO
        for number, entry in enumerate(self.entries):
            start, place = number * block, entry & PLACE
            length = min(block, size - start)
            if not entry:
                yield Extent(start, length, absent)
            elif entry & OWNED == OWNED or not by_sectors:
                yield Extent(start, length, Kind.DATA, place)
            else:
                sectors = unpack_bitmap(self.file.read_at(place - bitmap, bitmap), length // SECTOR)
                yield from _sector_extents(sectors, start, place)

    def shortcut(self, request: Request) -> int:
        """See `MappedDisk`. It is for a block that lacks sectors, but has all or none of those of the request."""
        offset, op, length = request.offset, request.op, request.length
        block = offset >> self.cluster_bits
        bitmap = self._bitmaps.young.get(block)
        if bitmap is None or op > 1:  # above Op.WRITE; looking the name up, or a division, would cost a tenth
            return 0
        inside = offset & self._inside_mask
        first, last = inside >> 9, inside + length >> 9
        present = bitmap.present
        count = present.count(1, first, last)
        if count:
            return (self.entries[block] & PLACE) + inside if count << 9 == length else 0
        if op or last > len(present) or offset + length > self._parent_size:
            return 0
        known = self._page_owners.known.get(block)
        if known is None or first >> 3 != last - 1 >> 3:
            return -1
        return -1 - known[first >> 3]

    def owner(self, offset: int, length: int) -> Driver | None:
        """See `MappedDisk`. The sectors that a block lacks are a parent's."""
        block, inside = divmod(offset, self._header.block_size)
        if inside + length > self._header.block_size or not self.entries[block] & SPECIAL:
            return super().owner(offset, length)
        bitmap = self._bitmaps.find(block)
        if bitmap is None:
            return None
        is_absent = bitmap.present.find(1, inside // SECTOR, (inside + length) // SECTOR) < 0
        return self._owner_below(offset, length) if is_absent and offset + length <= self._parent_size else self

    def _learn(self, offset: int) -> None:
        block = offset >> self.cluster_bits
        if not self.entries[block]:
            super()._learn(offset)
            return
        owner = self._owner_below(offset // PAGE * PAGE, PAGE)
        if owner is not None:
            self._page_owners.remember(block, (offset & self._inside_mask) // PAGE, self.owners.number(owner))

    def read_special(self, request: Request) -> None:
        """Read the sectors that the block has from the file, and the others from the parent."""
        block, first, last = self.sectors(request)
        bitmap = self._bitmaps.find(block)
        if bitmap is None:
            self.load_bitmap(block, request)
            return
        is_own = bitmap.present[first]
        for part in self.io.split(request, runs_of(bitmap.present, first, last)):
            if is_own:
                self.io.to_file(part, self.place(part))
            else:
                self.to_parent(part)
            is_own = not is_own

    def discard(self, request: Request) -> None:
        """See `MappedDisk`."""
        self._holes.make(request)

    @property
    def can_discard(self) -> bool:
        """Whether holes can be made, which read as zeros; a device's discard does not guarantee that."""
        return self.file.can_discard and not self._device_end

    def bitmap(self, block: int) -> bytearray | None:
        """Return which sectors a block has, a byte for each; None if its bitmap is not in memory."""
        bitmap = self._bitmaps.find(block)
        return bitmap.present if bitmap else None

    def write_elsewhere(self, request: Request) -> None:
        """Do a write to blocks that lack sectors, or are not there, one block at a time."""
        size, inside = self._header.block_size, request.offset % self._header.block_size
        ends = [*range(size - inside, request.length, size), request.length]
        for part in self.io.split(request, [end - start for start, end in zip([0, *ends], ends, strict=False)]):
            self._write(part)

    def _write(self, request: Request) -> None:
        block, first, last = self.sectors(request)
        entry = self.entries[block]
        if not entry:
            self._making.want(block, request, partial(self._make, block))
            return
        bitmap = self._bitmaps.find(block)
        if bitmap is None:
            self.load_bitmap(block, request)
        elif bitmap.present.find(0, first, last) < 0:
            self.io.to_file(request, self.place(request))
        else:
            self._bitmaps.pin(block)
            self.io.write_data(self.place(request), request.iov, partial(self._written, request, bitmap))

    def _written(self, request: Request, bitmap: Bitmap, status: int) -> None:
        """Have the bitmap written after the data are in the file."""
        block, first, last = self.sectors(request)
        if status:
            self._bitmaps.unpin(block)
            self.io.finish(request, status)
            return
        if bitmap.planned is bitmap.present:
            bitmap.planned = bitmap.present.copy()
        bitmap.planned[first:last] = b"\1" * (last - first)
        bitmap.write.want(partial(self._named, request))

    def _named(self, request: Request, status: int) -> None:
        self._bitmaps.unpin(request.offset >> self.cluster_bits)
        self.io.finish(request, status)

    def _write_bitmap(self, block: int, bitmap: Bitmap, then: Then) -> None:
        planned = bitmap.planned.copy()
        if planned == bitmap.present:
            then(0)
            return
        size = self._header.bitmap_size
        place = (self.entries[block] & PLACE) - size
        self.io.write_meta(
            place, pack_bitmap(planned, size), partial(self._bitmap_written, block, bitmap, planned, then)
        )

    def _bitmap_written(self, block: int, bitmap: Bitmap, planned: bytearray, then: Then, status: int) -> None:
        if not status:
            bitmap.present = planned
            if planned.find(0, 0, self._sectors_of(block)) < 0:
                self.entries[block] = self.entries[block] & PLACE | OWNED
                self._bitmaps.drop(block)
        then(status)

    def load_bitmap(self, block: int, request: Request) -> None:
        """Read a bitmap, once for all requests that need it, and dispatch those again."""
        self._loading_bitmap.want(block, request, partial(self._load_bitmap, block))

    def _load_bitmap(self, block: int, then: Then) -> None:
        size = self._header.bitmap_size
        self.io.read_meta((self.entries[block] & PLACE) - size, size, partial(self._bitmap_loaded, block, then))

    def _bitmap_loaded(self, block: int, then: Then, status: int, data: memoryview) -> None:
        if not status:
            present = unpack_bitmap(data, self._header.block_size // SECTOR)
            if present.find(0, 0, self._sectors_of(block)) < 0:
                self.entries[block] = self.entries[block] & PLACE | OWNED
            else:
                self._keep(block, present)
        then(status)

    def _keep(self, block: int, present: bytearray) -> None:
        bitmap = Bitmap(present)
        bitmap.write = Shared(partial(self._write_bitmap, block, bitmap), self.io.soon)
        self._bitmaps.put(block, bitmap)

    # New blocks.

    def _make(self, block: int, then: Then) -> None:
        run(self._make_block(block), lambda status, _: then(status))

    def _make_block(self, block: int) -> Steps[None]:
        """Make a new block. If that fails, it is tried again for the next request that needs the block."""
        self._wanted.append(block)
        try:
            yield self._room.want
        finally:
            place = self._places.pop(block, 0)
        size = self._header.bitmap_size
        is_full = self.parent is None and not self._device_end
        if is_full or self._device_end:  # else the file has zeros there
            yield partial(self.io.write_meta, place - size, b"\xff" * size if is_full else bytes(size))
        yield self.io.order
        self._coming[block] = place
        try:
            yield partial(self._table_writes.want, block // _PER_SECTOR)
        finally:
            del self._coming[block]
            self._table_writes.forget(block // _PER_SECTOR)
        self.entries[block] = place | (OWNED if is_full else SPECIAL)
        if not is_full:
            self._keep(block, bytearray(self._header.block_size // SECTOR))

    def _find_room(self, then: Then) -> None:
        """Find room at the end of the file for all blocks that need it."""
        wanted, self._wanted = self._wanted, []
        begin = end = self._device_end or self.file.size
        for block in wanted:
            place = self._places[block] = round_up(end + self._header.bitmap_size, PAGE)
            end = place + self._header.block_size
        if any(start < end and begin < stop for start, stop in self._taken_behind):
            then(IMAGE_DAMAGED)
        elif end > UNUSED * SECTOR or (self._device_end and end > self.file.size - SECTOR):
            then(errno.ENOSPC)
        elif self._device_end:
            self._device_end = end
            then(0)
        else:
            self.io.in_thread(partial(self.file.grow, round_up(end + SECTOR, PAGE), self._footer), then)

    def _write_table(self, sector: int, then: Then) -> None:
        """Write one sector of the table, with the entries of new blocks whose bitmaps are in the file."""
        first, room = sector * _PER_SECTOR, self._header.bitmap_size
        places = [entry & PLACE for entry in self.entries[first : first + _PER_SECTOR]]
        for block, place in self._coming.items():
            if first <= block < first + _PER_SECTOR:
                places[block - first] = place
        entries = [(place - room) // SECTOR if place else UNUSED for place in places]
        entries += [UNUSED] * (_PER_SECTOR - len(entries))
        self.io.write_meta(self._header.table_offset + sector * SECTOR, pack_entries(entries), then)

    # Arithmetic.

    def sectors(self, request: Request) -> tuple[int, int, int]:
        """Return the block of a request, the request's first sector in it, and the one after its last."""
        block, inside = divmod(request.offset, self._header.block_size)
        return block, inside // SECTOR, (inside + request.length) // SECTOR

    def _sectors_of(self, block: int) -> int:
        """Return how many sectors of a block the disk has: the last block may reach beyond the disk's end."""
        size = self._header.block_size
        return min(size, self.size - block * size) // SECTOR

    def place(self, request: Request) -> int:
        """Return the place in the file of a request to a block that is there."""
        block, inside = divmod(request.offset, self._header.block_size)
        return (self.entries[block] & PLACE) + inside


def _sector_extents(present: bytearray, start: int, place: int) -> Iterator[Extent]:
    inside, is_own = 0, present[0]
    for length in runs_of(present, 0, len(present)):
        where = (Kind.DATA, place + inside) if is_own else (Kind.ABSENT,)
        yield Extent(start + inside, length, *where)
        inside, is_own = inside + length, not is_own
