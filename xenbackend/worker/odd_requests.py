"""Sorts requests of every kind that were taken together: with data, without, against the rules, a barrier.

Must not lend, submit or answer anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xenbackend.blkif.abi import BLKIF_OP_DISCARD, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER
from xenbackend.blkif.request import RingRequest
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.units import PAGE, SECTOR
from xenbackend.worker.grants import CopiedGrants, PersistentGrants


class Sorted(NamedTuple):
    """The requests before the first barrier, that barrier, and the records behind it."""

    before: Sequence[RingRequest]  # all of them; those that break a rule are marked refused
    data: list[RingRequest]  # reads and writes
    ready: list[Request]  # flushes and discards
    barrier: RingRequest | None
    behind: list[RingRequest]


def sort_out(records: Sequence[RingRequest], grants: PersistentGrants | CopiedGrants) -> Sorted:
    """Sort decoded records; the segments of indirect ones are fetched and decoded here."""
    data: list[RingRequest] = []
    ready: list[Request] = []
    for place, record in enumerate(records):
        if record.indirect:
            _fetch_segments(record, grants)
            if record.refused is None:  # and only reads and writes are ever indirect
                data.append(record)
            continue
        if record.spans is None and record.length <= PAGE:  # one whole page; `grefs` is from an earlier use
            record.grefs = (record.gref,)
        if record.refused is not None:
            continue
        operation = record.operation
        if operation == BLKIF_OP_WRITE_BARRIER or (operation == BLKIF_OP_FLUSH_DISKCACHE and record.length):
            return Sorted(records[:place], data, ready, record, list(records[place + 1 :]))
        if operation in (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD):
            ready.append(_prepare(record))
        else:
            data.append(record)
    return Sorted(records, data, ready, None, [])


def _fetch_segments(record: RingRequest, grants: PersistentGrants | CopiedGrants) -> None:
    queue = record.owner
    copy = queue.segments
    grants.fetch_indirect(record, copy)
    if record.refused is None:
        queue.decode_indirect(record, copy)


def _prepare(record: RingRequest) -> Request:
    """Fill in the request of a record without data."""
    request: Request = record.request
    request.op = Op.DISCARD if record.operation == BLKIF_OP_DISCARD else Op.FLUSH
    request.offset = record.first_sector * SECTOR if request.op == Op.DISCARD else 0
    request.length = record.length
    request.iov = ()
    request.status = PENDING
    return request
