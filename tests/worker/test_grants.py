"""The two ways to access a guest's pages, on the rig: what is copied, how much fits, and what stays mapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests.driven import DOMID
from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE, X86_64
from xenbackend.blkif.features import MAX_SEGMENTS
from xenbackend.blkif.request import Decoder, RingRequest, encode_direct, encode_indirect, encode_segments
from xenbackend.block.request import Request
from xenbackend.kernel.ports import open_host
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import random_spans
from xenbackend.rig.xen import Xen
from xenbackend.units import PAGE, SECTOR
from xenbackend.worker.grants import ARENA_CHUNKS, CHUNK, FREE_SEGMENTS, CopiedGrants, PersistentGrants


@dataclass
class Table:
    """A guest's pages as both kinds of grants see them."""

    guest: Guest
    copied: CopiedGrants
    persistent: PersistentGrants

    def record(self, operation: int, spans: list[tuple[int, int]] | None, pages: int = 1) -> RingRequest:
        """Return a request over new pages of the guest; `spans` are first and last sectors, or None for whole pages."""
        record = RingRequest(0, None, Request())
        record.operation = operation
        frames = self.guest.allocate(len(spans) if spans else pages)
        record.grefs = [self.guest.grant(frame) for frame in frames]
        record.spans = spans and [(first * SECTOR, (last - first + 1) * SECTOR) for first, last in spans]
        record.length = sum(length for _, length in record.spans) if record.spans else pages * PAGE
        return record

    def bytes_of(self, record: RingRequest) -> memoryview:
        """Return all bytes of a record's pages; the rig allocates frames side by side."""
        first = self.guest.table.entries[record.grefs[0]] >> 32
        return self.guest.page(first, len(record.grefs))


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    """A guest, and both kinds of grants for its pages; nothing may stay mapped."""
    with Xen(tmp_path) as xen:
        guest = Guest(tmp_path, DOMID)
        host = open_host(f"xenbackend.rig.host:{tmp_path}")
        grants = host.open_grants(DOMID)
        copied = CopiedGrants(grants, host.allocate)
        persistent = PersistentGrants(grants, copied)
        yield Table(guest, copied, persistent)
        persistent.close()
        assert 0 == xen.held()["pins"]
        grants.close()
        guest.close()


@pytest.mark.parametrize("kind", ["copied", "persistent"])
@pytest.mark.rows("A12")
def test_segments_of_any_shape_are_the_requests_bytes(table: Table, kind: str) -> None:
    """`iov` has the bytes that the segments name, in order, even if a segment lies across two chunks."""
    grants = getattr(table, kind)
    random = Random(1)
    for sectors in (1, 7, 88, 300):
        write = table.record(BLKIF_OP_WRITE, random_spans(random, sectors))
        theirs = table.bytes_of(write)
        theirs[:] = random.randbytes(len(theirs))
        wanted = b"".join(
            theirs[number * PAGE + start : number * PAGE + start + length]
            for number, (start, length) in enumerate(write.spans or [])
        )
        (request,) = grants.lend([write])

        assert wanted == b"".join(request.iov)
        assert (1, sectors * SECTOR, -1) == (request.op, request.length, request.status)
        grants.settle([write])


def test_read_reaches_the_guest_when_it_is_settled(table: Table) -> None:
    """After `settle` the guest's segments have what was read, and the bytes beside them are unchanged."""
    read = table.record(BLKIF_OP_READ, [(1, 2), (7, 7), (0, 7)])
    theirs = table.bytes_of(read)
    theirs[:] = b"c" * len(theirs)
    (request,) = table.copied.lend([read])
    for view in request.iov:
        view[:] = b"r" * len(view)
    before = bytes(theirs)
    request.status = 0
    table.copied.settle([read])

    assert b"c" * 3 * PAGE == before
    assert b"c" * 512 + b"r" * 1024 + b"c" * 2560 + b"c" * 3584 + b"r" * 512 + b"r" * PAGE == bytes(theirs)


def test_failed_read_brings_nothing(table: Table) -> None:
    """A failed read copies nothing to the guest, since the memory may hold other data."""
    read = table.record(BLKIF_OP_READ, None)
    table.bytes_of(read)[:] = b"c" * PAGE
    (request,) = table.copied.lend([read])
    request.status = 5
    table.copied.settle([read])

    assert b"c" * PAGE == table.bytes_of(read)


def test_room_is_for_the_longest_requests(table: Table) -> None:
    """If `room` is at least 1, a request with the most segments fits; `settle` frees all memory."""
    longest = table.record(BLKIF_OP_READ, None, pages=MAX_SEGMENTS)
    records = []
    while table.copied.room(1):
        record = RingRequest(0, None, Request())
        record.grefs, record.length = longest.grefs, longest.length
        table.copied.lend([record])
        records.append(record)
    table.copied.settle(records)

    assert (ARENA_CHUNKS - 1) * CHUNK // (MAX_SEGMENTS * PAGE) == len(records)
    assert len(records) == table.copied.room(1000)
    assert {} == table.copied.held


def test_abandoned_memory_is_not_used_before_it_is_back(table: Table) -> None:
    """The memory of a request that a layer lost is not used again until the layer gives the request back."""
    lost = table.record(BLKIF_OP_READ, None)
    (request,) = table.copied.lend([lost])
    chunks = set(table.copied.held[lost])
    table.copied.abandon(lost, request)
    table.copied.settle([lost])
    missing = chunks & set(table.copied._free)
    table.copied.reclaim(request)

    assert set() == missing
    assert chunks <= set(table.copied._free)


def test_page_is_mapped_once(table: Table) -> None:
    """A page stays mapped once it was seen, and is not mapped again, even if a request names it twice."""
    record = table.record(BLKIF_OP_WRITE, None, pages=2)
    record.grefs = [*record.grefs, record.grefs[0]]
    record.length = 3 * PAGE
    for _ in range(3):
        table.persistent.lend([record])

    assert 2 == len(table.persistent._pages)
    assert {} == table.persistent.held


@pytest.mark.parametrize("is_indirect", [False, True])
def test_pages_that_were_mapped_together_are_one_view(table: Table, is_indirect: bool) -> None:
    """Adjacent whole pages are lent as one piece, whichever kind of request names them."""
    grefs = [table.guest.grant(frame) for frame in table.guest.allocate(11)]
    segments = [(gref, 0, 7) for gref in grefs]
    decoder = Decoder(X86_64, 88, read_only=False, can_flush=True, can_discard=True, max_segments=256)
    record = RingRequest(0, None, Request())
    if is_indirect:
        decoder.decode(memoryview(encode_indirect(X86_64, BLKIF_OP_WRITE, 1, 0, 11, [0])), [record])
        decoder.decode_indirect(record, memoryview(encode_segments(segments)))
    else:
        decoder.decode(memoryview(encode_direct(X86_64, BLKIF_OP_WRITE, 1, 0, segments)), [record])
    (request,) = table.persistent.lend([record])

    assert [11 * PAGE] == [len(view) for view in request.iov]


@pytest.mark.rows("A28")
def test_page_that_cannot_be_mapped_goes_the_other_way(table: Table) -> None:
    """A page that is granted read-only, and so cannot stay mapped for writing, is copied instead."""
    frame = table.guest.allocate(1)[0]
    table.guest.page(frame)[:] = b"o" * PAGE
    record = RingRequest(0, None, Request())
    record.operation, record.length = BLKIF_OP_WRITE, PAGE
    record.gref = table.guest.grant(frame, read_only=True)
    (request,) = table.persistent.lend_plain([record])

    assert b"o" * PAGE == b"".join(request.iov)
    assert [record] == list(table.persistent.held)
    table.persistent.settle([record])


@pytest.mark.parametrize("kind", ["copied", "persistent"])
def test_bad_page_marks_its_record_only(table: Table, kind: str) -> None:
    """A page that cannot be had refuses its own request, with a sentence; the others are lent."""
    grants = getattr(table, kind)
    good, bad = table.record(BLKIF_OP_WRITE, None, pages=3), table.record(BLKIF_OP_WRITE, None, pages=3)
    table.guest.fail(bad.grefs[2], -3)
    lent = grants.lend([bad, good])

    assert [good.request] == lent
    assert "grant copy ended with status -3" == str(bad.refused)
    grants.settle([good, bad])
    assert {} == grants.held


@pytest.mark.parametrize("status", [-3, -32768, 1, 2, 32767])
@pytest.mark.rows("B12", "R8")
def test_a_status_but_okay_is_a_failure(table: Table, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """R8: a page counts as copied only with GNTST_okay; any other status, even an unknown one above 0, refuses the
    request.
    """
    really = table.copied._table.copy
    monkeypatch.setattr(table.copied._table, "copy", lambda arena, copies: [*really(arena, copies)[:-1], status])
    write, read = table.record(BLKIF_OP_WRITE, None, pages=3), table.record(BLKIF_OP_READ, None, pages=3)
    lent_writes = table.copied.lend([write])
    (request,) = table.copied.lend([read])
    request.status = 0
    table.copied.settle([write, read])

    sentence = f"grant copy ended with status {status}"
    assert [] == lent_writes
    assert [sentence, sentence] == [str(write.refused), str(read.refused)]
    assert {} == table.copied.held


def test_long_requests_on_mapped_pages_count_as_if_they_were_copied(table: Table) -> None:
    """A29: requests of more than FREE_SEGMENTS mapped pages take room until they are settled, or come back after a bug.
    A successor lends what its predecessor had lent even if there is no room.
    """
    short = table.record(BLKIF_OP_READ, None, pages=FREE_SEGMENTS)
    assert [short.request] == table.persistent.lend([short])
    before = table.persistent.room(1000)
    long = [table.record(BLKIF_OP_READ, None, pages=MAX_SEGMENTS) for _ in range(2)]
    assert [record.request for record in long] == table.persistent.lend(long)
    during = table.persistent.room(1000)
    lost = long[1].request
    table.persistent.abandon(long[1], lost)
    for record in long:
        record.request.status = 0
    table.persistent.settle(long)
    after_one = table.persistent.room(1000)
    table.persistent.reclaim(lost)
    after_both = table.persistent.room(1000)
    has_room = True
    while has_room:
        has_room = bool(table.persistent.room(1))
        record = RingRequest(0, None, Request())
        record.operation, record.grefs, record.length = BLKIF_OP_READ, long[0].grefs, long[0].length
        assert [record.request] == table.persistent.lend([record])

    assert [before - 2, before - 1, before] == [during, after_one, after_both]
