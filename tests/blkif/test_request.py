"""Tests of `xenbackend.blkif.request`: whatever bytes a guest writes, there is a valid request or a named refusal."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    LAYOUTS,
    NATIVE,
    SEGMENT_SIZE,
    Layout,
)
from xenbackend.blkif.request import (
    BadDiscard,
    BadOperation,
    BadRequest,
    BadSegment,
    BadSegmentCount,
    Decoder,
    OutOfRange,
    ReadOnly,
    RingRequest,
    encode_direct,
    encode_discard,
    encode_indirect,
    encode_segments,
)
from xenbackend.units import SECTOR

SEED = 20240229
SECTORS = 2048  # of the disk
MAX_SEGMENTS = 256
READ, WRITE, BARRIER = BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER
FLUSH, DISCARD, INDIRECT = BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD, BLKIF_OP_INDIRECT
WHOLE = (0, 7)
ODD = [
    0,
    1,
    7,
    8,
    255,
    256,
    257,
    2**16 - 1,
    2**31,
    2**32 - 1,
    2**55,
    2**63,
    2**64 - 1,
    SECTORS - 8,
    SECTORS - 1,
    SECTORS,
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
FIELDS = [field for field in RingRequest.__slots__ if field not in ("entry", "owner", "request", "refused")]


def make_decoder(layout: Layout = NATIVE, sectors: int = SECTORS, **abilities: Any) -> Decoder:
    """Return a decoder for a writable disk with all features, changed by `abilities`."""
    agreed = {"read_only": False, "can_flush": True, "can_discard": True, "max_segments": MAX_SEGMENTS, **abilities}
    return Decoder(layout, sectors, **agreed)


def make_records(count: int) -> list[RingRequest]:
    """Return fresh records."""
    return [RingRequest(entry, None, None) for entry in range(count)]


def decode(decoder: Decoder, slot: bytes) -> RingRequest:
    """Return the record of one slot."""
    records = make_records(1)
    decoder.decode(memoryview(slot), records)
    return records[0]


def state(record: RingRequest) -> list[Any]:
    """Return what a record contains, to compare it with another one."""
    return [type(record.refused), *(getattr(record, field) for field in FIELDS)]


def segments_of(count: int, span: tuple[int, int] = WHOLE) -> list[tuple[int, int, int]]:
    """Return `count` segments of one span each, with ascending grefs."""
    return [(1000 + number, *span) for number in range(count)]


def random_slot(chance: random.Random, layout: Layout) -> bytes:
    """Return random bytes of some kind: pure noise, or a request with some valid and some invalid parts."""
    if chance.random() < 0.2:
        return chance.randbytes(layout.slot_size)
    sector = chance.choice([chance.randrange(SECTORS), chance.choice(ODD), chance.getrandbits(64)])
    spans = [chance.choice([WHOLE, WHOLE, (0, 0), (3, 5), (7, 7), (5, 3), (0, 8), (255, 255)]) for _ in range(11)]
    segments = [(chance.getrandbits(32), *span) for span in spans[: chance.choice([0, 1, 1, 1, 2, 11])]]
    guest_id = chance.getrandbits(64)
    kind = chance.randrange(4)
    if kind == 0:
        slot = bytearray(
            encode_discard(layout, guest_id, sector, chance.choice([*ODD, 8]), secure=chance.random() < 0.1)
        )
    elif kind == 1:
        inner = chance.choice([READ, WRITE, WRITE, *range(8)])
        slot = bytearray(encode_indirect(layout, inner, guest_id, sector, chance.choice([*ODD, 12]) & 0xFFFF, range(8)))
    else:
        slot = bytearray(encode_direct(layout, chance.choice([READ, WRITE, *range(8)]), guest_id, sector, segments))
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        slot[chance.randrange(len(slot))] = chance.getrandbits(8)
    return bytes(slot)


def check_law(layout: Layout, slot: bytes, record: RingRequest) -> None:
    """Assert that a record is a valid operation or refused, and can be answered, whatever the slot was."""
    operation, inner = slot[0], slot[1]
    assert int.from_bytes(slot[layout.segments_at - 16 : layout.segments_at - 8], "little") == record.guest_id
    assert (inner if operation == INDIRECT else operation) == record.operation
    if record.refused is not None:
        assert isinstance(record.refused, BadRequest)
        assert record.refused.status in {BLKIF_RSP_ERROR, BLKIF_RSP_EOPNOTSUPP}
    elif record.indirect:
        assert record.operation in {READ, WRITE}
        assert 1 <= record.segment_count <= MAX_SEGMENTS
        assert -(-record.segment_count // 512) == len(record.indirect)
    else:
        check_valid(record)


def check_valid(record: RingRequest) -> None:
    """Assert that an accepted request can be done: inside the disk, with as many bytes as its pages have."""
    assert record.operation in {READ, WRITE, BARRIER, FLUSH, DISCARD}
    if record.length:
        assert record.first_sector + record.length // SECTOR <= SECTORS
    if record.operation == DISCARD:
        assert record.length > 0
    elif record.spans is not None:
        assert len(record.grefs) == len(record.spans)
        assert record.length == sum(length for _, length in record.spans)
        assert all(0 <= at < at + length <= 4096 and not (at | length) % 512 for at, length in record.spans)
    elif record.grefs:
        assert len(record.grefs) * 4096 == record.length
    else:
        assert record.length == (0 if record.operation in {FLUSH, BARRIER} else 4096)


@pytest.mark.slow
@each_layout
def test_garbage_law(layout: Layout) -> None:
    """For any bytes in a slot the record is a valid operation or a refusal that can be answered; nothing is raised."""
    chance = random.Random(SEED)
    decoder = make_decoder(layout)
    accepted = 0
    for _ in range(5_000):
        slots = [random_slot(chance, layout) for _ in range(20)]
        records = make_records(20)
        plain = decoder.decode(memoryview(b"".join(slots)), records)
        for slot, record in zip(slots, records, strict=True):
            check_law(layout, slot, record)
            accepted += record.refused is None
        assert all(state(record)[0] is type(None) for record in records) or not plain

    assert 10_000 < accepted < 90_000  # both outcomes were common


@pytest.mark.slow
def test_garbage_law_of_indirect_pages() -> None:
    """For any bytes in indirect pages the record is a valid operation or a refusal."""
    chance = random.Random(SEED)
    decoder = make_decoder()
    for _ in range(3_000):
        count = chance.choice([1, 2, 12, 256])
        pages = bytearray(encode_segments(segments_of(count, chance.choice([WHOLE, (1, 6)]))))
        for _ in range(chance.choice([0, 1, 8])):
            pages[chance.randrange(len(pages))] = chance.getrandbits(8)
        sector = chance.choice([0, chance.randrange(SECTORS), chance.choice(ODD)])
        record = decode(decoder, encode_indirect(NATIVE, chance.choice([READ, WRITE]), 5, sector, count, [77]))
        decoder.decode_indirect(record, memoryview(bytes(pages)))

        assert 5 == record.guest_id
        assert () == record.indirect
        if record.refused is None:
            check_valid(record)


@pytest.mark.slow
@each_layout
def test_nothing_is_left_of_an_earlier_use(layout: Layout) -> None:
    """Records that were used before, and were reset unless plain, decode a slot as fresh ones do."""
    chance = random.Random(SEED)
    decoder = make_decoder(layout)
    used = make_records(8)
    for _ in range(2_500):
        some = used[: chance.randint(1, 8)]
        slots = [random_slot(chance, layout) for _ in some]
        fresh = make_records(len(some))
        for records in (some, fresh):
            plain = decoder.decode(memoryview(b"".join(slots)), records)
            for record in records:
                if record.indirect and record.refused is None:
                    segments = segments_of(record.segment_count, (0, record.segment_count % 9))
                    decoder.decode_indirect(record, memoryview(encode_segments(segments)))

        assert [state(record) for record in fresh] == [state(record) for record in some]
        if not plain:  # as a queue does it
            for record in some:
                record.reset()


def test_reset_makes_a_record_plain() -> None:
    """A record that was reset has no page, no span and no refusal."""
    record = decode(make_decoder(), encode_direct(NATIVE, WRITE, 1, SECTORS, segments_of(3)))
    record.reset()

    assert (0, (), None, (), 0, None) == (
        record.gref, record.grefs, record.spans, record.indirect, record.segment_count, record.refused,
    )  # fmt: skip


def edges() -> Iterator[tuple[int, int]]:
    """Yield (first sector, sectors) around the end of the disk and around every power where arithmetic might wrap."""
    for sector in (0, SECTORS - 1, SECTORS, SECTORS + 1, 2**32 - 1, 2**32 + 1, 2**55, 2**61, 2**63, 2**64 - 1):
        for length in (1, 8, 88, SECTORS):
            yield sector, length
            if sector == SECTORS:
                yield sector - length, length
                yield sector - length + 1, length


def slot_of(layout: Layout, operation: int, sector: int, length: int) -> bytes:
    """Return a request for `length` sectors, direct where they fit into eleven pages, else indirect."""
    if operation == DISCARD:
        return encode_discard(layout, 9, sector, length)
    whole, rest = divmod(length, 8)
    segments = segments_of(whole) + segments_of(1, (0, rest - 1)) * bool(rest)
    if len(segments) <= 11:
        return encode_direct(layout, operation, 9, sector, segments)
    return encode_indirect(layout, operation, 9, sector, len(segments), [77])


@each_layout
@pytest.mark.parametrize("operation", [READ, WRITE, BARRIER, FLUSH, DISCARD])
def test_boundary_grid(layout: Layout, operation: int) -> None:
    """A request is accepted exactly if all its sectors are on the disk, also where 64-bit arithmetic would wrap."""
    decoder = make_decoder(layout)
    for sector, length in edges():
        if operation in {BARRIER, FLUSH} and length > 88:
            continue  # these cannot be indirect
        record = decode(decoder, slot_of(layout, operation, sector, length))
        if record.indirect:
            decoder.decode_indirect(record, memoryview(encode_segments(segments_of(record.segment_count))))

        assert (None if sector + length <= SECTORS else OutOfRange) == (record.refused and type(record.refused))
        assert length * SECTOR == record.length


def test_growing_disk() -> None:
    """When a disk has grown, the next request may already reach its new end."""
    decoder = make_decoder()
    slot = encode_direct(NATIVE, READ, 1, SECTORS, segments_of(1))
    before = decode(decoder, slot)
    decoder.sectors = SECTORS + 8

    assert isinstance(before.refused, OutOfRange)
    assert decode(decoder, slot).refused is None


@each_layout
@pytest.mark.parametrize(
    ("abilities", "refused"),
    [
        ({}, {}),
        ({"read_only": True}, {WRITE: ReadOnly, BARRIER: ReadOnly, DISCARD: ReadOnly, "data flush": ReadOnly}),
        ({"can_flush": False}, dict.fromkeys([BARRIER, FLUSH, "data flush", "empty barrier"], BadOperation)),
        ({"can_discard": False}, {DISCARD: BadOperation}),
    ],
    ids=["able", "read-only", "no flush", "no discard"],
)
def test_operations_by_ability(layout: Layout, abilities: dict[str, bool], refused: dict[Any, type]) -> None:
    """An operation that was not offered is unsupported; no write to a read-only disk passes, direct or indirect."""
    decoder = make_decoder(layout, **abilities)
    slots: dict[Any, bytes] = {op: encode_direct(layout, op, 1, 0, segments_of(1)) for op in (READ, WRITE, BARRIER)}
    slots["data flush"] = encode_direct(layout, FLUSH, 1, 0, segments_of(1))
    slots[FLUSH] = encode_direct(layout, FLUSH, 1, 0, [])
    slots["empty barrier"] = encode_direct(layout, BARRIER, 1, 0, [])
    slots[DISCARD] = encode_discard(layout, 1, 0, 8)
    found = {kind: decode(decoder, slot).refused for kind, slot in slots.items()}

    assert refused == {kind: type(problem) for kind, problem in found.items() if problem is not None}


def test_read_only_holds_for_indirect_writes() -> None:
    """An indirect write to a read-only disk is refused as soon as its segments are known, an indirect read is not."""
    decoder = make_decoder(read_only=True)
    for operation, expected in ((READ, None), (WRITE, ReadOnly)):
        record = decode(decoder, encode_indirect(NATIVE, operation, 1, 0, 1, [77]))
        decoder.decode_indirect(record, memoryview(encode_segments(segments_of(1))))

        assert expected == (record.refused and type(record.refused))


@each_layout
def test_unknown_operations(layout: Layout) -> None:
    """Every unknown operation is answered as unsupported, which is how a frontend learns of it."""
    decoder = make_decoder(layout)
    for operation in set(range(256)) - {READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT}:
        record = decode(decoder, encode_direct(layout, operation, 3, 0, segments_of(1)))

        assert (BadOperation, BLKIF_RSP_EOPNOTSUPP) == (type(record.refused), record.refused and record.refused.status)
        assert (3, operation) == (record.guest_id, record.operation)


@each_layout
def test_indirect_requests_read_or_write(layout: Layout) -> None:
    """Only reads and writes can be indirect; the record has the inner operation, which the response must carry."""
    decoder = make_decoder(layout)
    for operation in range(256):
        record = decode(decoder, encode_indirect(layout, operation, 4, 0, 1, [77]))

        assert (4, operation) == (record.guest_id, record.operation)
        assert (operation in {READ, WRITE}) == (record.refused is None)


@each_layout
def test_direct_segment_counts(layout: Layout) -> None:
    """A slot has one to eleven segments; data with none are refused, and no more are ever read."""
    decoder = make_decoder(layout)
    for count in range(256):
        slot = bytearray(encode_direct(layout, READ, 1, 0, segments_of(min(count, 11), (1, 2))))
        slot[1] = count
        record = decode(decoder, bytes(slot))

        assert (1 <= count <= 11) == (record.refused is None)
        if record.refused is None:
            assert [1000 + number for number in range(count)] == list(record.grefs)
            assert [(512, 1024)] * count == record.spans
        else:
            assert isinstance(record.refused, BadSegmentCount)


def test_segment_spans() -> None:
    """A segment is accepted exactly if it ends no earlier than it begins, within the eight sectors of its page."""
    decoder = make_decoder()
    for first in (*range(9), 255):
        for last in (*range(9), 255):
            record = decode(decoder, encode_direct(NATIVE, READ, 1, 0, [(5, first, last), (6, *WHOLE)]))
            expected = None if first <= last <= 7 else BadSegment

            assert expected == (record.refused and type(record.refused))
            if record.refused is None:
                expected_spans = [(first * 512, (last - first + 1) * 512), (0, 4096)]
                assert (None if (first, last) == WHOLE else expected_spans) == record.spans
                assert [5, 6] == list(record.grefs)
                assert 4096 + (last - first + 1) * 512 == record.length


@each_layout
def test_whole_pages_stay_plain(layout: Layout) -> None:
    """A batch of reads and writes of one whole page each is reported as plain; one with any other request is not."""
    decoder = make_decoder(layout)
    pages = [encode_direct(layout, number % 2, number, 8 * number, [(70 + number, *WHOLE)]) for number in range(32)]
    records = make_records(32)

    assert decoder.decode(memoryview(b"".join(pages)), records) is True
    found = [(each.guest_id, each.operation, each.first_sector, each.length, each.gref) for each in records]
    assert [(number, number % 2, 8 * number, 4096, 70 + number) for number in range(32)] == found
    for other in (encode_direct(layout, FLUSH, 1, 0, []), encode_direct(layout, READ, 1, SECTORS, segments_of(1))):
        assert decoder.decode(memoryview(b"".join([*pages[:5], other, *pages[5:31]])), make_records(32)) is False


@each_layout
def test_each_record_gets_its_own_slot(layout: Layout) -> None:
    """In a batch of requests each record is decoded from its own slot, whatever entry the records begin at."""
    slots = [encode_direct(layout, READ, 10 + number, number, segments_of(number, (2, 3))) for number in range(1, 9)]
    records = [RingRequest(entry, None, None) for entry in range(500, 508)]
    make_decoder(layout).decode(memoryview(b"".join(slots)), records)

    assert [(10 + number, number, number) for number in range(1, 9)] == [
        (record.guest_id, record.first_sector, len(record.grefs)) for record in records
    ]


@each_layout
def test_indirect_round_trip(layout: Layout) -> None:
    """Indirect requests of up to the agreed number of segments are decoded as encoded; one more is refused."""
    decoder = make_decoder(layout)
    for count in range(1, MAX_SEGMENTS + 1):
        for span in (WHOLE, (0, 6)):
            segments = segments_of(count, span)
            record = decode(decoder, encode_indirect(layout, WRITE, count, 0, count, [77]))
            assert ([77], count, None) == (list(record.indirect), record.segment_count, record.refused)
            room = encode_segments(segments).ljust(4096, b"\xff")  # what follows the segments must be ignored
            decoder.decode_indirect(record, memoryview(room))

            length = count * SECTOR * (span[1] + 1)
            assert (length, [gref for gref, _, _ in segments]) == (record.length, list(record.grefs))
            assert (None if span == WHOLE else [(0, 3584)] * count) == record.spans
    for count in (0, MAX_SEGMENTS + 1, 0xFFFF):
        assert isinstance(
            decode(decoder, encode_indirect(layout, READ, 1, 0, count, range(8))).refused, BadSegmentCount
        )


def test_indirect_pages_by_count() -> None:
    """Each 512 segments need another page of segments, and only the pages that are needed are listed."""
    decoder = make_decoder(max_segments=4096)
    for count, pages in ((1, 1), (512, 1), (513, 2), (1024, 2), (4096, 8)):
        record = decode(decoder, encode_indirect(NATIVE, READ, 1, 0, count, range(50, 58)))

        assert list(range(50, 50 + pages)) == list(record.indirect)


def test_padding_of_segments_is_ignored() -> None:
    """The padding of a segment is ignored: a whole page stays one, whatever its padding contains."""
    decoder = make_decoder()
    pages = bytearray(encode_segments(segments_of(4)))
    pages[6::SEGMENT_SIZE] = b"\xee" * 4
    record = decode(decoder, encode_indirect(NATIVE, READ, 1, 0, 4, [77]))
    decoder.decode_indirect(record, memoryview(bytes(pages)))

    assert (None, 4 * 4096, [1000, 1001, 1002, 1003]) == (record.refused, record.length, list(record.grefs))


@each_layout
def test_discards(layout: Layout) -> None:
    """A discard is a range of sectors; a secure discard, which was not offered, and an empty one are refused."""
    decoder = make_decoder(layout)
    record = decode(decoder, encode_discard(layout, 6, 100, 50))

    assert (6, DISCARD, 100, 50 * SECTOR, None) == (
        record.guest_id, record.operation, record.first_sector, record.length, record.refused,
    )  # fmt: skip
    assert isinstance(decode(decoder, encode_discard(layout, 6, 0, 8, secure=True)).refused, BadOperation)
    assert isinstance(decode(decoder, encode_discard(layout, 6, 0, 0)).refused, BadDiscard)


@each_layout
def test_flush_and_empty_barrier(layout: Layout) -> None:
    """A flush and an empty barrier have no length and no range, whatever sector they name, even on a read-only disk."""
    for read_only in (False, True):
        decoder = make_decoder(layout, read_only=read_only)
        for operation in (FLUSH, BARRIER):
            record = decode(decoder, encode_direct(layout, operation, 8, 2**64 - 1, []))

            assert (operation, 0, 0, None) == (record.operation, record.length, len(record.grefs), record.refused)


@each_layout
@pytest.mark.parametrize("operation", [READ, WRITE, BARRIER, FLUSH])
def test_direct_round_trip(layout: Layout, operation: int) -> None:
    """For every number of segments the decoder finds in a slot what `encode_direct` has put there."""
    decoder = make_decoder(layout)
    for count in range(1, 12):
        segments: Sequence[tuple[int, int, int]] = [(2**32 - 1 - n, n % 4, 4 + n % 4) for n in range(count)]
        record = decode(decoder, encode_direct(layout, operation, 2**64 - count, 3, segments))

        assert (operation, 2**64 - count, 3, None) == (
            record.operation, record.guest_id, record.first_sector, record.refused,
        )  # fmt: skip
        assert [gref for gref, _, _ in segments] == list(record.grefs)
        assert [(first * 512, (last - first + 1) * 512) for _, first, last in segments] == record.spans
