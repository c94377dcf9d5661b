"""The two levels of tables: L1 in memory, L2 tables loaded when needed, changes written in small units.

Must not choose places in the file, nor know how a version writes an entry: the allocator and the codec do.

A change is visible in a table's entries only after it is in the file; until then they are `pending`. So no write of the
guest is answered before the table in the file refers to its data. Freed clusters go to the allocator after that.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import proxy

from xenbackend.block.formats.qcow2_tables import pack_table, unpack_table
from xenbackend.block.mapped.io import ImageIO
from xenbackend.block.mapped.shared import Once, Shared, SharedByNumber, Soon, Then
from xenbackend.block.mapped.tables import PLACE, WRITABLE, Tables
from xenbackend.loop.steps import Step, Steps, run
from xenbackend.units import SECTOR

UNIT = 4096  # bytes of a table that are written together; a smaller table is written whole


class Codec(Protocol):
    """Translates a version's tables: 64-bit words in the file, entries of `block.mapped.tables` in memory."""

    l2_bits: int

    def decode_l1(self, word: int) -> tuple[int, bool]:
        """Return the place of an L2 table, 0 if none, and whether it may be written in place. Raises: DriverError."""

    def encode_l1(self, place: int) -> int:
        """Return the word for an L2 table that may be written in place."""

    def decode_l2(self, words: array[int]) -> array[int]:
        """Return the entries of an L2 table. Raises: DriverError."""

    def check_table(self, number: int, entries: array[int]) -> None:
        """Check that the L2 table of this number can have these entries. Raises: DriverError."""

    def encode_l2(self, entry: int) -> int:
        """Return the word for an entry that is not SPECIAL."""

    def places_of(self, word: int) -> Sequence[int]:
        """Return the places of the clusters that a word of an L2 table uses, without those that cannot be freed."""


class Allocator(Protocol):
    """Allocates clusters of the file."""

    def reserve(self, count: int, then: Any) -> None:
        """Allocate up to `count` clusters in a row, and call ``then(status, place, got, is_zero)``."""

    def free(self, places: Sequence[int]) -> None:
        """Take back clusters to which no table refers (any more), except those that hold a table themselves."""

    def tables_among(self, places: Iterable[int]) -> set[int]:
        """Return those of `places` at which the image has a table, which must not be overwritten by data."""

    def refuse(self) -> Steps[None]:
        """Refuse a write that would destroy a table; mark the image as corrupt if possible. Raises: OSError, always."""

    def free_table(self, place: int) -> None:
        """Take back the room of an L2 table."""

    def note_table(self, place: int) -> None:
        """Note that clusters that were allocated now hold an L2 table."""


class L2Table(array):  # type: ignore[type-arg]  # its items are the "Q" that it is made with
    """The entries of an L2 table, and its state.

    It refers to itself by a proxy only: else it would stay in memory until the next garbage collection, perhaps long
    after the cache has dropped it. Those who wait for one of its writes keep a reference.
    """

    number: int
    place: int  # in the file, 0 if it is not there yet
    may_write: bool  # it is in the file, and not shared with a snapshot
    words: array[int]  # the file's words, as they will be when the writes under way have ended
    on_tables: set[int]  # indices of entries with the place of a table of the image: these must not change
    pending: set[int]  # indices of entries that are older than their words, which are on their way to the file
    units: SharedByNumber  # writes of parts of the table
    move: Shared  # moves the table to a place where it may be written


class L1Table:
    """The L1 table's words as in the file, together with the other content of their sectors."""

    def __init__(self, offset: int, sectors: bytes, write: Any, soon: Soon) -> None:
        """Take the whole sectors around the table.

        Args:
            offset: of the table in the file, in bytes.
            sectors: the file's content from the beginning of its first sector to the end of its last.
            write: writes to the file: ``write(place, data, then)``.
            soon: combines writes of the same sector, as in `Shared`.
        """
        self._first = offset // SECTOR * SECTOR
        self._inside = offset - self._first
        self._sectors = bytearray(sectors)
        self._write = write
        self._stores = SharedByNumber(self._store, soon)

    def __getitem__(self, number: int) -> int:
        return int.from_bytes(self._sectors[self._at(number) : self._at(number) + 8], "big")

    def __setitem__(self, number: int, word: int) -> None:
        self._sectors[self._at(number) : self._at(number) + 8] = word.to_bytes(8, "big")

    def words(self, count: int) -> array[int]:
        """Return the first `count` words."""
        return unpack_table(bytes(self._sectors[self._inside : self._inside + count * 8]))

    def store(self, number: int, then: Then) -> None:
        """Write the sector that an entry is in."""
        self._stores.want(self._at(number) // SECTOR, then)

    def _at(self, number: int) -> int:
        return self._inside + number * 8

    def _store(self, unit: int, then: Then) -> None:
        start = unit * SECTOR
        self._write(self._first + start, bytes(self._sectors[start : start + SECTOR]), then)


class Mapping:
    """Loads a disk's tables, and changes them.

    Args:
        io: the image's.
        codec: the version's codec.
        cluster_bits: a cluster has 2 to the power of this many bytes.
        l1: the L1 table.
        tables: the disk's cache of tables, each of which is an `L2Table`.
    """

    def __init__(self, io: ImageIO, codec: Codec, cluster_bits: int, l1: L1Table, tables: Tables[L2Table]) -> None:
        self._io = io
        self._codec = codec
        self._cluster_bits = cluster_bits
        self._l1 = l1
        self._tables = tables
        self._loading: Once[Then] = Once(lambda then, status, _: then(status))
        self._per_unit = min(UNIT >> 3, 1 << codec.l2_bits)
        self.allocator: Allocator | None = None  # None: the disk is read-only

    def load(self, number: int, then: Then) -> None:
        """Load a table, once for all callers that wait for it."""
        self._loading.want(number, then, lambda then: run(self._load(number), then))

    def is_mapped(self, number: int) -> bool:
        """Return whether there is a table of this number, without loading it."""
        return number in self._tables.young or self._l1[number] != 0

    def table(self, number: int) -> Generator[Any, Any, L2Table]:
        """Return a table, loading it if necessary. It may be dropped at the caller's next step. Raises: OSError."""
        while (table := self._tables.find(number)) is None:
            yield partial(self.load, number)
        return table

    def refuse_tables(self, number: int, span: range) -> Steps[None]:
        """Refuse to change entries that have the place of a table of the image. Raises: OSError, IMAGE_DAMAGED."""
        table = yield from self.table(number)
        if self.allocator is not None and not table.on_tables.isdisjoint(span):
            yield from self.allocator.refuse()

    def change(self, number: int, index: int, entries: Sequence[int]) -> Steps[None]:
        """Set adjacent entries of a table: first in the file, then in memory; then free their old clusters.

        Raises: OSError; nothing has changed in memory then.
        """
        span = range(index, index + len(entries))
        yield from self.refuse_tables(number, span)
        table = yield from self.table(number)
        self._tables.pin(number)
        try:
            while not table.pending.isdisjoint(span):  # an earlier change of some of these entries is under way
                yield self._unit(table, index) if table.may_write else table.move.want
            freed = yield from self._change(table, span, entries)
        finally:
            self._tables.unpin(number)
        if freed and self.allocator is not None:
            self.allocator.free(freed)

    def _change(self, table: L2Table, span: range, entries: Sequence[int]) -> Steps[list[int]]:
        """Change the entries of `span`, and return the places that they had."""
        here = slice(span.start, span.stop)
        before = table.words[here]
        table.words[here] = array("Q", map(self._codec.encode_l2, entries))
        table.pending.update(span)
        try:
            if not table.may_write:
                yield table.move.want
            for first in range(span.start // self._per_unit * self._per_unit, span.stop, self._per_unit):
                yield self._unit(table, first)
        except OSError:
            table.words[here] = before
            raise
        finally:
            table.pending.difference_update(span)
        table[here] = array("Q", entries)
        return [place for word in before for place in self._codec.places_of(word)]

    def _load(self, number: int) -> Steps[None]:
        place, may_write = self._codec.decode_l1(self._l1[number])
        data = bytes(8 << self._codec.l2_bits)
        if place:
            data = bytes((yield partial(self._io.read_meta, place, len(data))))
        else:
            yield self._soon  # otherwise the stack would grow with each table that a request covers
        words = unpack_table(data)
        table = L2Table("Q", self._codec.decode_l2(words))
        self._codec.check_table(number, table)
        table.number, table.place, table.may_write = number, place, may_write
        table.words, table.pending = words, set()
        table.units = SharedByNumber(partial(self._write_unit, proxy(table)), self._io.soon)
        table.on_tables = self._protect(table)
        table.move = Shared(partial(self._move, proxy(table)), self._io.soon)
        self._tables.put(number, table)

    def _protect(self, table: L2Table) -> set[int]:
        """Make entries with the place of a table of the image read-only, and return their indices."""
        if self.allocator is None or self._io.is_apart:
            return set()
        places = self.allocator.tables_among(entry & PLACE for entry in table if entry & WRITABLE)
        found = {index for index, entry in enumerate(table) if entry & PLACE in places} if places else set()
        for index in found:
            table[index] &= ~WRITABLE
        return found

    def _soon(self, then: Then) -> None:
        self._io.soon(partial(then, 0))

    def _move(self, table: L2Table, then: Then) -> None:
        run(self._find_place(table), lambda status, _: then(status))

    def _find_place(self, table: L2Table) -> Steps[None]:
        """Write a table to a new place, make it durable, then let L1 refer to it there."""
        if table.may_write:
            return
        assert self.allocator is not None  # noqa: S101 - nothing is changed where there is none
        size, cluster = 8 << self._codec.l2_bits, 1 << self._cluster_bits
        place = yield from self._room(max(1, size // cluster))
        before = self._l1[table.number]
        try:
            yield partial(self._io.write_meta, place, pack_table(table.words))
            yield self._io.order
            self._l1[table.number] = self._codec.encode_l1(place)
            yield partial(self._l1.store, table.number)
        except OSError:
            self._l1[table.number] = before  # the new place stays allocated, since the file's word may have changed
            raise
        self.allocator.note_table(place)
        if table.place:
            self.allocator.free_table(table.place)
        table.place, table.may_write = place, True

    def _room(self, count: int) -> Generator[Any, Any, int]:
        """Allocate `count` clusters in a row, and return their place."""
        assert self.allocator is not None  # noqa: S101 - nothing is changed where there is none
        while True:
            place, got, _ = yield partial(self.allocator.reserve, count)
            if got == count:
                return int(place)
            self.allocator.free([place + (each << self._cluster_bits) for each in range(got)])

    def _unit(self, table: L2Table, index: int) -> Step:
        """Return the step that writes the part of a table that an entry is in."""
        return partial(table.units.want, index // self._per_unit * self._per_unit)

    def _write_unit(self, table: L2Table, first: int, then: Then) -> None:
        data = pack_table(table.words[first : first + self._per_unit])
        self._io.write_meta(table.place + first * 8, data, then)
