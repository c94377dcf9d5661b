"""The blkif wire format as tables: operations, statuses, and where each field lies in each layout.

Must not contain a loop over anything that a guest controls, nor decide anything.

Source: Xen's public headers `io/blkif.h`, `io/ring.h`, `io/protocols.h` (4.17.7). `tests/data/abi.json` holds offsets
and sample bytes that a C compiler made from those headers; the tests compare.

    struct blkif_request   operation u8, nr_segments u8, handle u16, id u64, sector_number u64, seg[11]
    struct ..._segment     gref u32, first_sect u8, last_sect u8, 2 bytes of padding
    struct ..._discard     operation u8, flag u8, handle u16, id u64, sector_number u64, nr_sectors u64
    struct ..._indirect    operation u8, indirect_op u8, nr_segments u16, id u64, sector_number u64, handle u16,
                           2 bytes of padding, indirect_grefs[8] u32
    struct blkif_response  id u64, operation u8, 1 byte of padding, status s16 (and 4 more of padding on x86_64)

On x86_64 a u64 is aligned to 8 bytes, on i386 to 4: the layouts differ in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

BLKIF_OP_READ = 0
BLKIF_OP_WRITE = 1
BLKIF_OP_WRITE_BARRIER = 2
BLKIF_OP_FLUSH_DISKCACHE = 3
BLKIF_OP_DISCARD = 5
BLKIF_OP_INDIRECT = 6

BLKIF_RSP_OKAY = 0
BLKIF_RSP_ERROR = -1
BLKIF_RSP_EOPNOTSUPP = -2

BLKIF_DISCARD_SECURE = 1  # flag of a discard
BLKIF_MAX_SEGMENTS_PER_REQUEST = 11
BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST = 8
SEGMENTS_PER_INDIRECT_PAGE = 512  # PAGE / sizeof(struct blkif_request_segment)
SEGMENT_SIZE = 8  # bytes
LAST_SECTOR_OF_PAGE = 7

VDISK_CDROM = 1
VDISK_REMOVABLE = 2
VDISK_READONLY = 4

# `struct blkif_sring`, io/ring.h: four u32 indices, padding to 64 bytes, then the slots
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 1, 2, 3  # as indices of 32-bit words
RING_HEADER = 64  # bytes
MAX_RING_ORDER = 4

SEGMENTS = [Struct("<" + "IBBxx" * count) for count in range(BLKIF_MAX_SEGMENTS_PER_REQUEST + 1)]
WHOLE_PAGE = (LAST_SECTOR_OF_PAGE << 8).to_bytes(4, "little")  # first_sect 0, last_sect 7, padding zero


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields lie for one kind of frontend. All `Struct`s start at the slot's first byte.

    `one` covers a whole slot and yields (operation, nr_segments, handle, id, sector_number, gref, first, last): a
    request with its first segment. `glance` yields the same fields as six values instead of eight, for the loop over
    all requests: (operation | nr_segments << 8, handle, id, sector_number, gref, first | last << 8).

    `discard` yields (operation, flag, handle, id, sector_number, nr_sectors), and `indirect` yields (operation,
    indirect_op, nr_segments, id, sector_number, handle, eight grefs). `indirect_grefs` yields only the eight grefs:
    `one` and `glance` have the rest already, because operation, indirect_op, nr_segments, id and sector_number lie
    where operation, nr_segments, handle, id and sector_number of a direct request do.

    `response` takes (id, operation, status) and zeroes the padding.
    """

    protocol: str  # the value of the frontend's `protocol` node, io/protocols.h
    slot_size: int  # bytes: the union of request and response
    segments_at: int  # bytes
    one: Struct
    glance: Struct
    discard: Struct
    indirect: Struct
    indirect_grefs: Struct
    response: Struct


X86_64 = Layout(
    protocol="x86_64-abi",
    slot_size=112,
    segments_at=24,
    one=Struct("<BBH4xQQIBB82x"),
    glance=Struct("<HH4xQQIH82x"),
    discard=Struct("<BBH4xQQQ"),
    indirect=Struct("<BBH4xQQH2x8I"),
    indirect_grefs=Struct("<28x8I"),
    response=Struct("<QBxh4x"),
)
X86_32 = Layout(
    protocol="x86_32-abi",
    slot_size=108,
    segments_at=20,
    one=Struct("<BBHQQIBB82x"),
    glance=Struct("<HHQQIH82x"),
    discard=Struct("<BBHQQQ"),
    indirect=Struct("<BBHQQH2x8I"),
    indirect_grefs=Struct("<24x8I"),
    response=Struct("<QBxh"),
)
LAYOUTS = {layout.protocol: layout for layout in (X86_64, X86_32)}
NATIVE = X86_64  # 64-bit Arm ("arm-abi") has the same offsets


def ring_entries(layout: Layout, order: int) -> int:
    """Return how many slots a ring of 2**order pages has: the largest power of two that fits (`__RING_SIZE`)."""
    return 1 << (((4096 << order) - RING_HEADER) // layout.slot_size).bit_length() - 1
