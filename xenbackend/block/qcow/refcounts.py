"""The allocator of a QCOW2 image: its refcounts in the file, and clusters that are reserved to be handed out.

Must not know what a cluster is used for.

Refcounts are raised in advance for a batch of clusters, and made durable before the first of these is handed out. So no
table can refer to a cluster that is free in the file, whichever writes survive a crash. They are lowered only after a
flush that follows the write of the last table that referred to them. A crash leaks at most one batch and what was freed
since the last flush: the room is lost until a repair, and nothing else.
"""

from __future__ import annotations

import errno
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any

from xenbackend.block.formats.qcow2 import (
    CORRUPT,
    MAX_REFCOUNT_TABLE_BYTES,
    Header,
    Region,
    incompatible_bytes,
    refcount_table_bytes,
)
from xenbackend.block.formats.qcow2_tables import (
    pack_refcounts,
    pack_table,
    refcount_block_of,
    unpack_refcounts,
)
from xenbackend.block.mapped.io import ImageIO
from xenbackend.block.mapped.shared import Then
from xenbackend.block.mapped.tables import Tables
from xenbackend.block.qcow.occupied import Occupied
from xenbackend.block.request import IMAGE_DAMAGED
from xenbackend.loop.steps import Line, Steps
from xenbackend.units import SECTOR, round_up

FIRST_BATCH, MAX_BATCH = 1 << 20, 16 << 20  # bytes reserved in advance: few at first, then more and more
_CACHE = 4 << 20  # bytes of refcount blocks that are cached, as in the file; up to twice that
_GROW = 64 * 1024  # bytes: the file's size is a multiple of this, which suits the sectors of any medium

Reserved = Callable[[int, int, int, bool], None]  # status, place, clusters, whether they read as zeros


class Refcounts:
    """Hands out clusters of an image that is open for writing.

    Args:
        io: the image's.
        header: the image's header.
        table: the refcount table.
        occupied: the clusters of the image's tables.
    """

    def __init__(self, io: ImageIO, header: Header, table: array[int], occupied: Occupied) -> None:
        self._io = io
        self._occupied = occupied
        self._is_corrupt = False
        self._header = header
        self._table = table
        self._region = header.refcount_table
        self._blocks: Tables[array[int]] = Tables(_CACHE >> header.cluster_bits)
        self._per_block = 1 << header.block_bits
        self._line = Line()
        self._cursor = 0  # clusters before it are taken to be in use
        self._next = self._end = 0  # reserved clusters: counted in the file, and not handed out yet
        self._fresh = -(-io.file.size >> header.cluster_bits)  # from this cluster on nothing was ever written
        self._is_zero = False  # whether the reserved clusters read as zeros
        self._batch = FIRST_BATCH
        self._freed: list[int] = []  # clusters that no table refers to once the writes so far are durable
        self._waiting: list[tuple[int, Reserved]] = []

    def reserve(self, count: int, then: Reserved) -> None:
        """Hand out up to `count` clusters in a row; see `Allocator`."""
        self._waiting.append((count, then))
        if self._next < self._end:
            self._serve()
        elif len(self._waiting) == 1:
            self._line.add(self._refill(), self._refilled)

    def free(self, places: Sequence[int]) -> None:
        """Take back clusters that no table refers to any more; see `Allocator`."""
        tables = self._occupied.among(places)
        self._freed += [place >> self._header.cluster_bits for place in places if place not in tables]

    def tables_among(self, places: Iterable[int]) -> set[int]:
        """See `Allocator`."""
        return self._occupied.among(places)

    def refuse(self) -> Steps[None]:
        """See `Allocator`. Nothing is reserved from now on, since other things may be wrong, too."""
        if not self._is_corrupt and self._header.version >= 3:
            place, fields = incompatible_bytes(self._header.incompatible | CORRUPT)
            sector = bytearray((yield partial(self._io.read_meta, 0, SECTOR)))
            sector[place : place + len(fields)] = fields
            yield partial(self._io.write_meta, 0, bytes(sector))
            yield self._io.sync
        self._is_corrupt = True
        raise OSError(IMAGE_DAMAGED, "a write would overwrite a table of the image")

    def free_table(self, place: int) -> None:
        """Take back the room of an L2 table; see `Allocator`."""
        self._occupied.remove_table(place)
        self._freed.append(place >> self._header.cluster_bits)  # a snapshot that shares it keeps it

    def note_table(self, place: int) -> None:
        """See `Allocator`."""
        self._occupied.add_table(place)

    @property
    def freed_count(self) -> int:
        """The number of freed clusters that wait for a flush."""
        return len(self._freed)

    def take_freed(self) -> list[int]:
        """Return the clusters freed so far; pass them to `lower` after a flush that begins after this call."""
        freed, self._freed = self._freed, []
        return freed

    def keep_freed(self, clusters: list[int]) -> None:
        """Take back what `take_freed` returned, because the flush failed."""
        self._freed += clusters

    def lower(self, clusters: list[int], then: Then) -> None:
        """Lower the refcounts of freed clusters. A failure leaks them, and is not an error: `then` always gets 0."""
        steps = self._lower(Counter(clusters))
        self._io.when_quiet(lambda: self._line.add(steps, lambda _status, _result: then(0)))

    def close(self) -> None:
        """Free the clusters that are reserved or freed, by blocking calls; nothing is in flight. Raises: OSError."""
        file = self._io.file
        unused = Counter(range(self._next, self._end))
        if not (unused or self._freed):
            return
        file.sync()
        unused.update(self._freed)
        self._next, self._end, self._freed = 0, 0, []
        for index, lowered in self._by_block(unused).items():
            place = refcount_block_of(self._table[index], self._header)
            block = unpack_refcounts(file.read_at(place, self._header.cluster_size), self._header.refcount_order)
            _subtract(block, lowered)
            for offset, data in self._changes(block, lowered):
                file.write_at(place + offset, data)

    def _serve(self) -> None:
        waiting, self._waiting = self._waiting, []
        for place, (count, then) in enumerate(waiting):
            got = min(count, self._end - self._next)
            if not got:
                self._waiting = waiting[place:] + self._waiting
                self._line.add(self._refill(), self._refilled)
                return
            first = self._next
            self._next += got
            then(0, first << self._header.cluster_bits, got, self._is_zero)

    def _refilled(self, status: int, _: Any) -> None:
        if not status:
            self._serve()
            return
        waiting, self._waiting = self._waiting, []
        for _count, then in waiting:
            then(status, 0, 0, False)

    def _refill(self) -> Steps[None]:
        """Find free clusters, and reserve them. Raises: OSError, ENOSPC if there is no room."""
        while self._next == self._end:
            index, start = divmod(self._cursor, self._per_block)
            if index >= len(self._table):
                yield from self._grow_table()
                continue
            if not self._table[index]:
                yield from self._new_block(index)
                continue
            block = yield from self._block(index)
            try:
                first = block.index(0, start)
            except ValueError:
                self._cursor = (index + 1) * self._per_block
                continue
            yield from self._raise(index, block, first)

    def _raise(self, index: int, block: array[int], first: int) -> Steps[None]:
        """Reserve the free clusters of a block from `first` on, at most a batch of them."""
        most = min(len(block), first + max(1, self._batch >> self._header.cluster_bits))
        end = first + 1
        while end < most and not block[end]:
            end += 1
        base = index * self._per_block
        yield from self._refuse_tables(base + first, base + end)
        end = self._make_room(base + first, base + end) - base
        raised = block[:]
        for place in range(first, end):
            raised[place] = 1
        yield from self._store(index, raised, range(first, end))
        yield self._io.order
        self._blocks.put(index, raised)
        self._next, self._end = base + first, base + end
        self._cursor = self._end
        self._is_zero = self._next >= self._fresh
        self._fresh = max(self._fresh, self._end)
        self._batch = min(2 * self._batch, MAX_BATCH)

    def _refuse_tables(self, first: int, end: int) -> Steps[None]:
        """Refuse to reserve clusters at which a table is. Raises: OSError, IMAGE_DAMAGED."""
        if self._is_corrupt or self._occupied.find(first, end) is not None:
            yield from self.refuse()

    def _make_room(self, first: int, end: int) -> int:
        """Grow the file up to cluster `end`; return the cluster up to which that succeeded. Raises: OSError."""
        bits, file = self._header.cluster_bits, self._io.file
        try:
            file.grow(round_up(end << bits, _GROW))
        except OSError:  # a block device, or a full file system: the room that there is may suffice
            end = min(end, file.size >> bits)
            if end <= first:
                raise
        return end

    def _new_block(self, index: int) -> Steps[None]:
        """Make a refcount block, in the first of the clusters that it counts, all of which are free."""
        if not index:
            raise OSError(errno.EIO, "the refcounts of the header are missing")
        first = index * self._per_block
        yield from self._refuse_tables(first, first + 1)
        self._make_room(first, first + 1)
        block = array("Q", bytes(8 * self._per_block))
        block[0] = 1
        place = first << self._header.cluster_bits
        yield partial(self._io.write_meta, place, pack_refcounts(block, self._header.refcount_order))
        yield self._io.order
        self._fresh = max(self._fresh, first + 1)
        self._table[index] = place
        try:
            yield from self._store_table(index)
            yield self._io.order
        except OSError:
            self._table[index] = 0
            raise
        self._occupied.add_table(place)
        self._blocks.put(index, block)

    def _store_table(self, index: int) -> Steps[None]:
        first = index // (SECTOR // 8) * (SECTOR // 8)
        data = pack_table(self._table[first : first + SECTOR // 8])
        yield partial(self._io.write_meta, self._region.offset + first * 8, data)

    def _grow_table(self) -> Steps[None]:
        """Write a larger refcount table after all clusters, with the blocks that count it, then have the header use it.

        Raises: OSError.
        """
        size, bits = self._header.cluster_size, self._header.cluster_bits
        first = len(self._table) * self._per_block
        clusters = (len(self._table) * 8 * 3 // 2 >> bits) + 1
        if clusters * size > MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.ENOSPC, "the refcount table has its largest size")
        blocks = 1
        while blocks * self._per_block < blocks + clusters:
            blocks += 1
        end = first + blocks + clusters
        yield from self._refuse_tables(first, end)
        self._make_room(end - 1, end)
        counts = array("Q", bytes(8 * blocks * self._per_block))
        for place in range(blocks + clusters):
            counts[place] = 1
        table = self._table[:] + array("Q", [(first + block) << bits for block in range(blocks)])
        table.extend([0] * (clusters * size // 8 - len(table)))
        region = Region((first + blocks) << bits, clusters * size)
        data = pack_refcounts(counts, self._header.refcount_order) + pack_table(table)
        yield partial(self._io.write_meta, first << bits, data)
        yield self._io.order
        sector = bytearray((yield partial(self._io.read_meta, 0, SECTOR)))
        place, fields = refcount_table_bytes(region, size)
        sector[place : place + len(fields)] = fields
        yield partial(self._io.write_meta, 0, bytes(sector))
        yield self._io.order
        self._occupied.move(self._region, region)
        for block in range(first, first + blocks):
            self._occupied.add_table(block << bits)
        self.free(range(self._region.offset, self._region.offset + self._region.length, size))
        self._table, self._region, self._cursor = table, region, end
        self._fresh = max(self._fresh, end)

    def _lower(self, lowered: Counter[int]) -> Steps[None]:
        for index, places in self._by_block(lowered).items():
            block = (yield from self._block(index))[:]
            _subtract(block, places)
            yield from self._store(index, block, places)
            self._blocks.put(index, block)
            self._cursor = min(self._cursor, index * self._per_block + min(places))

    def _by_block(self, clusters: Counter[int]) -> dict[int, Counter[int]]:
        found: dict[int, Counter[int]] = defaultdict(Counter)
        for cluster, times in clusters.items():
            index, place = divmod(cluster, self._per_block)
            if index < len(self._table) and self._table[index]:
                found[index][place] = times
        return found

    def _block(self, index: int) -> Generator[Any, Any, array[int]]:
        """Return a refcount block as in the file, which must not be modified. Raises: OSError, DriverError."""
        block = self._blocks.find(index)
        if block is None:
            place = refcount_block_of(self._table[index], self._header)
            data = yield partial(self._io.read_meta, place, self._header.cluster_size)
            block = unpack_refcounts(bytes(data), self._header.refcount_order)
            self._blocks.put(index, block)
        return block

    def _store(self, index: int, block: array[int], places: Sequence[int] | Counter[int]) -> Steps[None]:
        offset = refcount_block_of(self._table[index], self._header)
        for place, data in self._changes(block, places):
            yield partial(self._io.write_meta, offset + place, data)

    def _changes(self, block: array[int], places: Sequence[int] | Counter[int]) -> list[tuple[int, bytes]]:
        """Return the sectors of a block that hold the refcounts of `places`: offset in the block, and content."""
        order = self._header.refcount_order
        per_sector = SECTOR * 8 >> order
        sectors = sorted({place // per_sector for place in places})
        return [
            (sector * SECTOR, pack_refcounts(block[sector * per_sector : (sector + 1) * per_sector], order))
            for sector in sectors
        ]


def _subtract(block: array[int], places: Counter[int]) -> None:
    for place, times in places.items():
        block[place] = max(0, block[place] - times)
