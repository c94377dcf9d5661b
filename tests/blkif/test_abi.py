"""Tests of `xenbackend.blkif.abi` against what a C compiler makes of Xen's headers, kept in data/abi.json."""

from __future__ import annotations

import json
import re
import shutil
from struct import Struct
from typing import Any

import pytest

from tests.tools import dump_abi
from xenbackend.blkif import abi
from xenbackend.blkif.abi import LAYOUTS, Layout, ring_entries
from xenbackend.blkif.handshake import XenbusState, name

HEADERS: dict[str, Any] = json.loads(dump_abi.RESULT.read_text())["layouts"]
HANDLE, ID, SECTOR = 0xCA01, 0x1122334455667788, 0x99AABBCCDDEEFF00  # as in dump_abi.c
FIELDS = {
    "one": ("blkif_request", ["operation", "nr_segments", "handle", "id", "sector_number"]),
    "discard": ("blkif_request_discard", ["operation", "flag", "handle", "id", "sector_number", "nr_sectors"]),
    "indirect": (
        "blkif_request_indirect",
        ["operation", "indirect_op", "nr_segments", "id", "sector_number", "handle"],
    ),
    "response": ("blkif_response", ["id", "operation", "status"]),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def numbers(layout: Layout) -> dict[str, int]:
    """Return the compiler's numbers for a layout."""
    found: dict[str, int] = HEADERS[layout.protocol]["numbers"]
    return found


def sample(layout: Layout, kind: str) -> bytes:
    """Return the compiler's bytes of a request or response."""
    return bytes.fromhex(HEADERS[layout.protocol]["samples"][kind])


def offsets(struct: Struct) -> list[int]:
    """Return the byte where each field of a `Struct` begins."""
    found = []
    for place in range(len(struct.unpack(bytes(struct.size)))):
        values = [0] * len(struct.unpack(bytes(struct.size)))
        values[place] = 1  # little-endian: the first byte of the field
        found.append(struct.pack(*values).index(1))
    return found


def can_compile() -> bool:
    """Return whether this machine has the tools and headers that dump_abi.py needs."""
    return dump_abi.HEADER.exists() and all(shutil.which(program) for program in dump_abi.NEEDED)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no gcc, objcopy or libxen-dev here")
def test_data_is_what_the_headers_say() -> None:
    """The committed numbers and bytes are those that this machine's compiler and headers give."""
    assert HEADERS == dump_abi.dump()


def test_every_layout_of_the_headers_is_known() -> None:
    """Each protocol that was compiled has one table, under the name that a frontend writes."""
    assert set(HEADERS) == set(LAYOUTS)


@each_layout
def test_constants(layout: Layout) -> None:
    """Every constant that bears a header's name has the header's value."""
    in_headers = numbers(layout)
    ours = {name: value for name, value in vars(abi).items() if re.match("BLKIF_|VDISK_", name)}

    assert {name: in_headers[name] for name in ours} == ours


@each_layout
@pytest.mark.parametrize("table", FIELDS)
def test_offsets(layout: Layout, table: str) -> None:
    """Each field of each table lies where the compiler puts it."""
    kind, fields = FIELDS[table]
    found = offsets(getattr(layout, table))

    assert [numbers(layout)[f"{kind}.{field}"] for field in fields] == found[: len(fields)]


@each_layout
def test_offsets_of_what_repeats(layout: Layout) -> None:
    """Segments and indirect grant refs lie side by side, from the place where the compiler puts the first."""
    in_headers = numbers(layout)
    first = in_headers["blkif_request.seg"]
    within = [in_headers[f"blkif_request_segment.{field}"] for field in ("gref", "first_sect", "last_sect")]
    grefs = in_headers["blkif_request_indirect.indirect_grefs"]

    assert first == layout.segments_at
    assert [first + place for place in within] == offsets(layout.one)[5:]
    assert [number * abi.SEGMENT_SIZE + place for number in range(11) for place in within] == offsets(abi.SEGMENTS[11])
    assert [grefs + 4 * number for number in range(8)] == offsets(layout.indirect)[6:]


@each_layout
def test_sizes(layout: Layout) -> None:
    """Slots, segments and responses have the compiler's sizes, and no table reaches beyond its slot."""
    in_headers = numbers(layout)

    assert in_headers["sizeof union blkif_sring_entry"] == layout.slot_size == layout.one.size
    assert in_headers["sizeof blkif_request_segment"] == abi.SEGMENT_SIZE
    assert [abi.SEGMENT_SIZE * count for count in range(12)] == [each.size for each in abi.SEGMENTS]
    assert in_headers["sizeof blkif_request_discard"] == layout.discard.size
    assert in_headers["sizeof blkif_request_indirect"] >= layout.indirect.size
    assert in_headers["sizeof blkif_response"] == layout.response.size
    assert 4096 // in_headers["sizeof blkif_request_segment"] == abi.SEGMENTS_PER_INDIRECT_PAGE


@each_layout
def test_rings(layout: Layout) -> None:
    """The header of a ring and the slots of each order have the layout that the macros give."""
    in_headers = numbers(layout)
    words = [in_headers[f"blkif_sring.{index}"] // 4 for index in ("req_prod", "req_event", "rsp_prod", "rsp_event")]

    assert words == [abi.REQ_PROD, abi.REQ_EVENT, abi.RSP_PROD, abi.RSP_EVENT]
    assert in_headers["blkif_sring.ring"] == abi.RING_HEADER
    for order in range(abi.MAX_RING_ORDER + 1):
        assert in_headers[f"ring entries, order {order}"] == ring_entries(layout, order)


@each_layout
def test_bytes_of_a_request(layout: Layout) -> None:
    """A request with eleven segments is decoded from the compiler's bytes, and encoded to the same bytes."""
    slot = sample(layout, "request")
    head = (abi.BLKIF_OP_WRITE, 11, HANDLE, ID, SECTOR)
    spans = [(0, 7), (1, 6), (2, 5), (3, 4), (4, 4), (5, 5), (6, 6), (7, 7), (0, 0), (0, 1), (0, 2)]
    segments = [value for place, span in enumerate(spans, 0xF0000001) for value in (place, *span)]
    made = bytearray(layout.one.pack(*head, 0, 0, 0))
    abi.SEGMENTS[11].pack_into(made, layout.segments_at, *segments)

    assert (*head, *segments[:3]) == layout.one.unpack(slot)
    assert segments == list(abi.SEGMENTS[11].unpack_from(slot, layout.segments_at))
    assert slot == made


@each_layout
def test_bytes_of_the_other_kinds(layout: Layout) -> None:
    """A discard, an indirect request and a response are encoded to the compiler's bytes, padding included."""
    discard = layout.discard.pack(
        abi.BLKIF_OP_DISCARD, abi.BLKIF_DISCARD_SECURE, HANDLE, ID, SECTOR, 0x123456789ABCDEF0
    )
    grefs = (1, 2, 3, 4, 5, 6, 7, 0xFFFFFFFF)
    indirect = layout.indirect.pack(abi.BLKIF_OP_INDIRECT, abi.BLKIF_OP_WRITE, 0x123, ID, SECTOR, HANDLE, *grefs)
    response = layout.response.pack(ID, abi.BLKIF_OP_WRITE, abi.BLKIF_RSP_EOPNOTSUPP)

    assert sample(layout, "discard") == discard
    assert sample(layout, "indirect") == indirect.ljust(numbers(layout)["sizeof blkif_request_indirect"], b"\0")
    assert sample(layout, "response") == response


@each_layout
def test_a_whole_page_is_known_by_its_bytes(layout: Layout) -> None:
    """The four bytes that mark a whole page are those that follow the grant ref of a segment from sector 0 to 7."""
    segment = layout.one.pack(0, 1, 0, 0, 0, 0xFFFFFFFF, 0, abi.LAST_SECTOR_OF_PAGE)[layout.segments_at :]

    assert segment[4 : abi.SEGMENT_SIZE] == abi.WHOLE_PAGE


@each_layout
def test_states_of_xenbus(layout: Layout) -> None:
    """The states of the handshake have the header's names and numbers."""
    in_headers = numbers(layout)
    theirs = {key.removeprefix("XenbusState"): value for key, value in in_headers.items() if key.startswith("Xenbus")}

    assert theirs == {name(state): state.value for state in XenbusState}
