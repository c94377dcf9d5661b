"""Substitutes for requests that a layer's bug has lost (D8): they take their places and end with an error.

Must not answer anything.

A layer below may still hold such a request and give it back later. So the guest's request gets a new `Request`, and the
old one belongs to no guest's request any longer.
"""

from __future__ import annotations

import errno

from xenbackend.blkif.request import RingRequest
from xenbackend.block.request import Request
from xenbackend.worker.barrier import Barrier
from xenbackend.worker.grants import CopiedGrants, PersistentGrants


def is_ours(request: Request) -> bool:
    """Return whether a request is the guest's: not one that a layer made, nor one that a bug ended before."""
    tag = request.tag
    return isinstance(tag, Barrier) or (isinstance(tag, RingRequest) and tag.request is request)


def substitute(request: Request, grants: PersistentGrants | CopiedGrants) -> Request:
    """Return a request with status EIO in the place of a lost one, with which the memory stays."""
    other = Request(request.tag)
    other.op, other.status = request.op, errno.EIO
    record = request.tag.record if isinstance(request.tag, Barrier) else request.tag
    if record.request is request:
        record.request = other
        grants.abandon(record, request)
    request.tag = None
    return other
