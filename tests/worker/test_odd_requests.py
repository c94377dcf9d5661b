"""How a mixed batch is sorted: requests with data, requests without, invalid ones, and the first barrier."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from xenbackend.blkif.abi import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    X86_64,
)
from xenbackend.blkif.request import (
    BadGrant,
    Decoder,
    RingRequest,
    encode_direct,
    encode_discard,
    encode_indirect,
    encode_segments,
)
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.units import PAGE
from xenbackend.worker.odd_requests import Sorted, sort_out

SECTORS = 4096
WHOLE = (7, 0, 7)
HALF = (8, 0, 3)


class Pages:
    """A source of the segments of indirect requests; with `fails` the guest's page cannot be had."""

    def __init__(self, content: bytes = b"", *, fails: bool = False) -> None:
        self.content = content
        self.fails = fails

    def fetch_indirect(self, record: RingRequest, copy: memoryview) -> None:
        """Copy the segments."""
        copy[: len(self.content)] = self.content
        if self.fails:
            record.refused = BadGrant("it cannot be had")


def direct(operation: int, *segments: tuple[int, int, int], sector: int = 8) -> bytes:
    """Return a slot."""
    return encode_direct(X86_64, operation, 1, sector, segments)


def sort(*slots: bytes, pages: Any = None) -> tuple[list[RingRequest], Sorted]:
    """Decode slots as a queue does, sort them, and return both."""
    decoder = Decoder(X86_64, SECTORS, read_only=False, can_flush=True, can_discard=True, max_segments=256)
    owner = SimpleNamespace(segments=memoryview(bytearray(8 * 256)), decode_indirect=decoder.decode_indirect)
    records = [RingRequest(place, owner, Request()) for place in range(len(slots))]
    for record in records:
        record.request.tag = record
    decoder.decode(memoryview(b"".join(slots)), records)
    return records, sort_out(records, pages or Pages())


def test_each_kind_goes_where_it_belongs() -> None:
    """Reads and writes need memory, flushes and discards are ready, and an invalid request is in neither list."""
    records, found = sort(
        direct(BLKIF_OP_READ, WHOLE),
        direct(BLKIF_OP_FLUSH_DISKCACHE),
        direct(BLKIF_OP_WRITE, WHOLE, HALF),
        encode_discard(X86_64, 1, 16, 24),
        direct(99, WHOLE),
    )

    assert [records[0], records[2]] == found.data
    assert [records[1].request, records[3].request] == found.ready
    assert (None, []) == (found.barrier, found.behind)
    assert records == list(found.before)
    assert [False] * 4 + [True] == [record.refused is not None for record in records]


def test_what_has_no_data_is_ready_to_be_submitted() -> None:
    """Flushes and discards are pending and have no memory; a discard has its place and length in bytes."""
    _, found = sort(direct(BLKIF_OP_FLUSH_DISKCACHE), encode_discard(X86_64, 1, 16, 24))
    flush, discard = found.ready

    assert (Op.FLUSH, 0, 0, (), PENDING) == (flush.op, flush.offset, flush.length, flush.iov, flush.status)
    assert (Op.DISCARD, 16 * 512, 24 * 512, ()) == (discard.op, discard.offset, discard.length, discard.iov)


def test_a_page_among_others_names_its_own_grant() -> None:
    """A request of one whole page has the grant in its own slot, whatever an earlier request left there."""
    records, _ = sort(direct(BLKIF_OP_READ, WHOLE), direct(BLKIF_OP_FLUSH_DISKCACHE))

    assert (7,) == records[0].grefs


def test_a_barrier_ends_what_is_sorted() -> None:
    """Requests behind the first barrier are left as they were taken. A flush with data is a barrier, one without is
    not.
    """
    for slot in (
        direct(BLKIF_OP_WRITE_BARRIER, WHOLE),
        direct(BLKIF_OP_WRITE_BARRIER),
        direct(BLKIF_OP_FLUSH_DISKCACHE, WHOLE),
    ):
        records, found = sort(direct(BLKIF_OP_WRITE, WHOLE), direct(99), slot, direct(BLKIF_OP_READ, WHOLE), slot)

        assert [records[0]] == found.data
        assert records[:2] == list(found.before)
        assert (records[2], records[3:]) == (found.barrier, found.behind)


def test_indirect_segments_are_fetched_and_checked() -> None:
    """The segments of an indirect request are fetched once and decoded; if that fails, only this request is refused."""
    slots = [encode_indirect(X86_64, BLKIF_OP_WRITE, 1, 8, 2, [5]), direct(BLKIF_OP_READ, WHOLE)]
    records, found = sort(*slots, pages=Pages(encode_segments([WHOLE, WHOLE])))
    good = (found.data == records, records[0].length)
    outcomes = []
    bad = encode_segments([WHOLE, (7, 5, 4)])
    for pages in (Pages(bad, fails=True), Pages(bad)):
        records, found = sort(*slots, pages=pages)
        outcomes.append((found.data == records[1:], type(records[0].refused).__name__))

    assert (True, 2 * PAGE) == good
    assert [(True, "BadGrant"), (True, "BadSegment")] == outcomes
