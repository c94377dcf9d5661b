"""Decodes copies of ring slots into checked requests, and encodes requests as slots.

Must not map a grant, touch a file, or read shared memory: its input is already a private copy (R4).

Invariant: from any bytes, the decoder makes either a valid operation or a `BadRequest` in `RingRequest.refused`. It
raises nothing, and its work is bounded. `guest_id` and `operation` are correct in both cases, so that the request can
be answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

from xenbackend.blkif.abi import (
    BLKIF_DISCARD_SECURE,
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    LAST_SECTOR_OF_PAGE,
    SEGMENT_SIZE,
    SEGMENTS,
    SEGMENTS_PER_INDIRECT_PAGE,
    WHOLE_PAGE,
    Layout,
)
from xenbackend.errors import GuestError
from xenbackend.units import PAGE, SECTOR

_SEGMENT = Struct("<IBBxx")
_ONE_READ, _ONE_WRITE = 1 << 8 | BLKIF_OP_READ, 1 << 8 | BLKIF_OP_WRITE  # as `Layout.glance` gives them
_WHOLE = LAST_SECTOR_OF_PAGE << 8
_FROM_FIRST = [(0,) * count for count in range(BLKIF_MAX_SEGMENTS_PER_REQUEST + 1)]  # sectors of whole pages
_TO_LAST = [(LAST_SECTOR_OF_PAGE,) * count for count in range(BLKIF_MAX_SEGMENTS_PER_REQUEST + 1)]
_WHOLE_PAGES = [WHOLE_PAGE * count for count in range(SEGMENTS_PER_INDIRECT_PAGE + 1)]


class BadRequest(GuestError):
    """A request that breaks a rule; `status` is the status of its response."""

    status = BLKIF_RSP_ERROR


class BadOperation(BadRequest):
    """An operation that is unknown, or that we have not offered."""

    status = BLKIF_RSP_EOPNOTSUPP


class BadSegmentCount(BadRequest):
    """No segment in a request that needs data, or more segments than agreed."""


class BadSegment(BadRequest):
    """A segment that ends before it begins or leaves its page."""


class BadDiscard(BadRequest):
    """A discard of no sectors."""


class OutOfRange(BadRequest):
    """Sectors beyond the end of the disk."""


class ReadOnly(BadRequest):
    """A request that would change a read-only disk."""


class BadGrant(BadRequest):
    """A page that could not be mapped or copied."""


class RingRequest:
    """One decoded request, pooled with its journal entry.

    Between uses, and after decoding a request for one whole page, it is plain: `gref` is the page; `grefs` and the
    attributes below it are empty.

    operation      BLKIF_OP_*; for an indirect request the inner one, which the response must carry
    first_sector   in 512-byte sectors; the range lies inside the disk
    length         bytes, 0 for a flush or an empty barrier
    grefs          the data pages in order, unless the data is exactly one whole page
    spans          (first byte, bytes) per page; None in a plain record, and for several pages that are all whole
    indirect       the pages that hold the segments, until `Decoder.decode_indirect` is called; then empty
    segment_count  segments in those pages
    refused        the rule that was broken, or None
    """

    __slots__ = (
        "entry", "first_sector", "gref", "grefs", "guest_id", "indirect", "length", "operation", "owner",
        "refused", "request", "segment_count", "spans",
    )  # fmt: skip

    def __init__(self, entry: int, owner: Any, request: Any) -> None:
        self.entry = entry  # the journal entry that holds the copy
        self.owner = owner  # belongs to the owner of the pool; not used here
        self.request = request  # the request that goes through the chain; not used here
        self.guest_id = 0
        self.operation = 0
        self.first_sector = 0
        self.length = 0
        self.reset()

    def reset(self) -> None:
        """Make the record plain again."""
        self.gref = 0
        self.grefs: Sequence[int] = ()
        self.spans: list[tuple[int, int]] | None = None
        self.indirect: Sequence[int] = ()
        self.segment_count = 0
        self.refused: BadRequest | None = None


class Decoder:
    """Decodes the slots of one ring, for one disk."""

    def __init__(
        self, layout: Layout, sectors: int, *, read_only: bool, can_flush: bool, can_discard: bool, max_segments: int
    ) -> None:
        """Set the agreed values: the disk's size in 512-byte sectors, and the most segments of an indirect request."""
        self.sectors = sectors
        self._layout = layout
        self._read_only = read_only
        self._can_flush = can_flush
        self._can_discard = can_discard
        self._max_segments = max_segments
        self._each_slot = layout.glance.iter_unpack

    def decode(self, slots: memoryview, records: Sequence[RingRequest]) -> bool:
        """Decode copies of slots, len(records) * slot_size bytes, into as many plain records.

        Returns: True if all of them stayed plain: reads or writes of one whole page, nothing refused.
        """
        sectors = self.sectors
        writable = not self._read_only
        plain = True
        each = self._each_slot(slots)
        for record, (head, handle, guest_id, sector, gref, edges) in zip(records, each, strict=True):
            record.guest_id = guest_id
            record.first_sector = sector
            if edges == _WHOLE and sector + 8 <= sectors and (head == _ONE_READ or (head == _ONE_WRITE and writable)):
                record.operation = head & 1
                record.length = PAGE
                record.gref = gref
                continue
            plain = False
            record.operation = operation = head & 0xFF
            count = head >> 8
            start = (record.entry - records[0].entry) * self._layout.slot_size
            if operation == BLKIF_OP_INDIRECT:  # fields two and three have another meaning there, see `abi.Layout`
                record.operation = count
                self._decode_indirect_head(record, handle, self._layout.indirect_grefs.unpack_from(slots, start))
            else:
                self._decode_other(record, count, slots[start : start + self._layout.slot_size])
        return plain

    def decode_indirect(self, record: RingRequest, segments: memoryview) -> None:
        """Decode the segments of an indirect request from a private copy of its pages, 8 bytes per segment.

        Whole pages are recognised with one comparison: with 256 segments, most of a request's time is spent here.
        """
        record.indirect = ()
        count = record.segment_count
        words = segments[: count * SEGMENT_SIZE].cast("I")
        try:
            if words[1::2].tobytes() == _WHOLE_PAGES[count]:
                record.grefs = words[0::2].tolist()
                record.length = count * PAGE
                self._check_range(record)
            else:
                self._take_segments(record, list(_SEGMENT.iter_unpack(segments[: count * SEGMENT_SIZE])))
        except BadRequest as problem:
            record.refused = problem

    def _decode_other(self, record: RingRequest, count: int, slot: memoryview) -> None:
        record.reset()
        record.length = 0
        operation = record.operation
        try:
            if operation in (BLKIF_OP_READ, BLKIF_OP_WRITE):
                self._decode_data(record, count, slot)
            elif operation in (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER) and self._can_flush:
                if count:
                    self._decode_data(record, count, slot)
            elif operation == BLKIF_OP_DISCARD and self._can_discard:
                self._decode_discard(record, slot)
            else:
                raise BadOperation(f"operation {operation} is not offered by this disk")
        except BadRequest as problem:
            record.refused = problem

    def _decode_data(self, record: RingRequest, count: int, slot: memoryview) -> None:
        if not 1 <= count <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            raise BadSegmentCount(f"{count} segments in a request; 1 to {BLKIF_MAX_SEGMENTS_PER_REQUEST} are possible")
        values = SEGMENTS[count].unpack_from(slot, self._layout.segments_at)
        grefs, first, last = values[0::3], values[1::3], values[2::3]
        if count > 1 and first == _FROM_FIRST[count] and last == _TO_LAST[count]:  # all at once, as `decode_indirect`
            record.grefs = list(grefs)  # not a tuple: it is compared with lists of pages that are mapped side by side
            record.length = count * PAGE
            self._check_range(record)
        else:
            self._take_segments(record, list(zip(grefs, first, last, strict=True)))

    def _decode_indirect_head(self, record: RingRequest, count: int, grefs: tuple[int, ...]) -> None:
        record.reset()
        record.length = 0
        if record.operation not in (BLKIF_OP_READ, BLKIF_OP_WRITE):
            record.refused = BadOperation(f"operation {record.operation} cannot be indirect")
        elif not 1 <= count <= self._max_segments:
            most = self._max_segments
            record.refused = BadSegmentCount(f"{count} segments in an indirect request; 1 to {most} were agreed")
        else:
            record.segment_count = count
            record.indirect = grefs[: -(-count // SEGMENTS_PER_INDIRECT_PAGE)]

    def _decode_discard(self, record: RingRequest, slot: memoryview) -> None:
        _, flag, _, guest_id, sector, count = self._layout.discard.unpack_from(slot)
        record.guest_id = guest_id
        record.first_sector = sector
        record.length = count * SECTOR
        if flag & BLKIF_DISCARD_SECURE:
            raise BadOperation("secure discard is not offered, as it cannot be guaranteed that no copy is left")
        if not count:
            raise BadDiscard("a discard of no sectors")  # layers never see a request for no bytes
        self._check_range(record)

    def _take_segments(self, record: RingRequest, segments: list[tuple[int, int, int]]) -> None:
        for _, first, last in segments:
            if not first <= last <= LAST_SECTOR_OF_PAGE:
                raise BadSegment(f"a segment from sector {first} to {last} of a page, whose sectors are 0 to 7")
        record.grefs = [gref for gref, _, _ in segments]
        record.spans = [(first * SECTOR, (last - first + 1) * SECTOR) for _, first, last in segments]
        record.length = sum(length for _, length in record.spans)
        self._check_range(record)

    def _check_range(self, record: RingRequest) -> None:
        if record.operation != BLKIF_OP_READ and self._read_only:
            raise ReadOnly("a request that would change a read-only disk")
        if record.first_sector + record.length // SECTOR > self.sectors:
            raise OutOfRange(
                f"{record.length // SECTOR} sectors from {record.first_sector} on, beyond the end of a disk of "
                f"{self.sectors}"
            )


def encode_direct(
    layout: Layout, operation: int, guest_id: int, sector: int, segments: Sequence[tuple[int, int, int]]
) -> bytes:
    """Return the slot of a direct request; `segments` are (gref, first sector, last sector) within each page."""
    slot = bytearray(layout.slot_size)
    gref, first, last = segments[0] if segments else (0, 0, 0)
    layout.one.pack_into(slot, 0, operation, len(segments), 0, guest_id, sector, gref, first, last)
    SEGMENTS[len(segments)].pack_into(slot, layout.segments_at, *(part for segment in segments for part in segment))
    return bytes(slot)


def encode_indirect(
    layout: Layout, operation: int, guest_id: int, sector: int, count: int, pages: Sequence[int]
) -> bytes:
    """Return the slot of an indirect request whose `count` segments lie in the pages with the grefs `pages`."""
    slot = bytearray(layout.slot_size)
    grefs = [*pages, *[0] * (8 - len(pages))]
    layout.indirect.pack_into(slot, 0, BLKIF_OP_INDIRECT, operation, count, guest_id, sector, 0, *grefs)
    return bytes(slot)


def encode_discard(layout: Layout, guest_id: int, sector: int, count: int, *, secure: bool = False) -> bytes:
    """Return the slot of a discard of `count` sectors."""
    slot = bytearray(layout.slot_size)
    flag = BLKIF_DISCARD_SECURE if secure else 0
    layout.discard.pack_into(slot, 0, BLKIF_OP_DISCARD, flag, 0, guest_id, sector, count)
    return bytes(slot)


def encode_segments(segments: Sequence[tuple[int, int, int]]) -> bytes:
    """Return the content of indirect pages: (gref, first sector, last sector) per segment."""
    return b"".join(_SEGMENT.pack(*segment) for segment in segments)
