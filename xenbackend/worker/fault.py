"""What becomes of requests that a layer's bug has lost (D8): others take their places and end with an error.

Must not answer anything.

Somebody below may hold such a request too and give it back later. So the guest's request gets a new `Request`, and the
old one belongs to nobody from now on.
"""

from __future__ import annotations

import errno

from xenbackend.blkif.request import RingRequest
from xenbackend.block.request import Request
from xenbackend.worker.barrier import Barrier
from xenbackend.worker.grants import CopiedGrants, PersistentGrants


def is_ours(request: Request) -> bool:
    """False for a request that a layer made for itself, and for one that a bug had ended before."""
    tag = request.tag
    return isinstance(tag, Barrier) or (isinstance(tag, RingRequest) and tag.request is request)


def substitute(request: Request, grants: PersistentGrants | CopiedGrants) -> Request:
    """Return a request that ends with EIO in the place of one that was lost; its memory stays with the lost one."""
    other = Request(request.tag)
    other.op, other.status = request.op, errno.EIO
    record = request.tag.record if isinstance(request.tag, Barrier) else request.tag
    if record.request is request:
        record.request = other
        grants.abandon(record, request)
    request.tag = None
    return other
