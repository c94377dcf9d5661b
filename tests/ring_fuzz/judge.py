"""What the protocol says that a slot is worth: the answer, and what of it the disk may see.

Must not call what it judges: it reads a slot's bytes by itself, after io/blkif.h and what was agreed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import le
from struct import Struct
from typing import NamedTuple

from xenbackend.blkif.abi import X86_64, Layout

OKAY, ERROR, UNSUPPORTED = 0, -1, -2  # BLKIF_RSP_*
READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT = 0, 1, 2, 3, 5, 6  # BLKIF_OP_*
_MOST_DIRECT, _PER_PAGE, _MOST = 11, 512, 256
_SEGMENT = 8  # bytes: gref u32, first and last sector u8, padding
_GREFS = [Struct("<" + "I4x" * count) for count in range(_MOST + 1)]  # of so many segments
_PAGES = [Struct(f"<{count}I") for count in range(9)]
_ZEROS, _SEVENS = bytes(_MOST), b"\7" * _MOST
_U16, _U64 = Struct("<H"), Struct("<Q")


@dataclass(frozen=True, slots=True)
class Agreement:
    """What holds for a connection: the disk and the guest's grants.

    known                 grefs of the pool and of list pages, granted or not
    readable, writable    those that a backend may copy from, and to
    lists                 those of list pages
    list_page             returns the bytes of the page of a gref that is readable
    is_strange            says whether a gref that is not known is granted: a ring's, or a neighbour's for a moment
    """

    layout: Layout
    sectors: int
    read_only: bool
    can_flush: bool
    can_discard: bool
    max_segments: int
    known: frozenset[int]
    readable: frozenset[int]
    writable: frozenset[int]
    lists: frozenset[int]
    list_page: Callable[[int], memoryview]
    is_strange: Callable[[int], bool]


class Verdict(NamedTuple):
    """The answer to a slot.

    operation   that the response must carry
    status      that it must carry
    why         in a word
    disk        (operation of the disk's, first byte, bytes) that may reach the disk; None where nothing may
    is_strange  it names a page that is none of its business; the guest would harm itself
    is_open     what it says lies in a page that other messages write to: any answer is right, and any of its reads
    """

    operation: int
    status: int
    why: str
    disk: tuple[int, int, int] | None = None
    is_open: bool = False
    is_strange: bool = False


def judge(slot: bytes, agreed: Agreement, own_list: int) -> Verdict:
    """Return what a slot must be answered; `own_list` is the one list page that no other message changes."""
    wide = agreed.layout is X86_64
    operation, second = slot[0], slot[1]
    (sector,) = _U64.unpack_from(slot, 16 if wide else 12)
    if operation == INDIRECT:
        return _indirect(slot, agreed, own_list, 28 if wide else 24)
    if operation in (READ, WRITE):
        return _data(slot, agreed, operation, second, sector)
    if operation in (BARRIER, FLUSH) and agreed.can_flush:
        if second == 0:
            return Verdict(operation, OKAY, "flush", (2, 0, 0))
        return _data(slot, agreed, operation, second, sector)
    if operation == DISCARD and agreed.can_discard:
        return _discard(slot, agreed, second, sector, 24 if wide else 20)
    return Verdict(operation, UNSUPPORTED, "operation")


def _discard(slot: bytes, agreed: Agreement, flag: int, sector: int, at: int) -> Verdict:
    (count,) = _U64.unpack_from(slot, at)
    if flag & 1:
        return Verdict(DISCARD, UNSUPPORTED, "secure")
    if agreed.read_only or not count or sector + count > agreed.sectors:
        return Verdict(DISCARD, ERROR, "discard")
    return Verdict(DISCARD, OKAY, "discards", (3, sector * 512, count * 512))


def _data(slot: bytes, agreed: Agreement, operation: int, count: int, sector: int) -> Verdict:
    if not 1 <= count <= _MOST_DIRECT:
        return Verdict(operation, ERROR, "count")
    at = agreed.layout.segments_at
    return _segments(slot[at : at + _SEGMENT * count], count, agreed, operation, sector)


def _indirect(slot: bytes, agreed: Agreement, own_list: int, at: int) -> Verdict:
    operation = slot[1]
    (sector,) = _U64.unpack_from(slot, 16 if agreed.layout is X86_64 else 12)
    if operation not in (READ, WRITE):
        return Verdict(operation, UNSUPPORTED, "inner operation")
    (count,) = _U16.unpack_from(slot, 2)
    if not 1 <= count <= agreed.max_segments:
        return Verdict(operation, ERROR, "indirect count")
    pages = _PAGES[-(-count // _PER_PAGE)].unpack_from(slot, at)
    if not agreed.known.issuperset(pages) and any(map(agreed.is_strange, pages)):
        return Verdict(operation, ERROR, "strange", is_strange=True)
    if not agreed.readable.issuperset(pages):
        return Verdict(operation, ERROR, "list page")
    if pages != (own_list,) and any(
        gref in agreed.writable or (gref in agreed.lists and gref != own_list) for gref in pages
    ):
        return Verdict(operation, ERROR, "page that changes", is_open=True)
    size = _SEGMENT * count  # which is less than a page: no more than 256 segments were ever agreed on
    return _segments(bytes(agreed.list_page(pages[0])[:size]), count, agreed, operation, sector)


def _segments(content: bytes, count: int, agreed: Agreement, operation: int, sector: int) -> Verdict:
    first, last = content[4::_SEGMENT], content[5::_SEGMENT]
    if first == _ZEROS[:count] and last == _SEVENS[:count]:
        length = 8 * count  # as below, which takes longer
    elif max(last) > 7 or not all(map(le, first, last)):
        return Verdict(operation, ERROR, "segment")
    else:
        length = sum(last) - sum(first) + count
    if sector + length > agreed.sectors:
        return Verdict(operation, ERROR, "range")
    if operation != READ and agreed.read_only:
        return Verdict(operation, ERROR, "read-only")
    grefs = _GREFS[count].unpack(content)
    if not agreed.known.issuperset(grefs) and any(map(agreed.is_strange, grefs)):
        return Verdict(operation, ERROR, "strange", is_strange=True)
    if not (agreed.writable if operation == READ else agreed.readable).issuperset(grefs):
        # A read is done before its pages are found to be bad; a write must not reach the disk.
        touched = (0, sector * 512, length * 512) if operation == READ else None
        return Verdict(operation, ERROR, "grant", touched)
    return Verdict(operation, OKAY, "data", (min(operation, 1), sector * 512, length * 512))
