"""What travels through a chain: one `Request` per thing in flight, pooled by whoever lends it.

Must not know a segment, a grant, a sector or a file.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

PENDING = -1  # `Request.status` while it is lent
_ZEROS = bytes(64 * 1024)
IMAGE_DAMAGED = errno.ENOTRECOVERABLE  # of a write that would destroy more; no file system returns that

CACHE_LOST = errno.EBADSLT  # what was answered is in a cache alone, which cannot be used now; no file system returns it
AWAY = errno.ENOLINK  # the server of the disk is away: nothing is known of what was sent, and it is to be sent again


class Op(IntEnum):
    """What a request asks for. A barrier never gets here: the engine lowers it to drain, flush, write, flush."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3


class Request:
    """One operation in flight, lent downward by `submit` and given back by `complete`.

    Units: `offset` and `length` are bytes, multiples of 512, inside the disk that the layer announced.
    `iov` holds writable memoryviews of bytes whose lengths add up to `length` (READ, WRITE); empty otherwise.
    `status` is `PENDING` while lent, then 0 for done or a positive errno.
    `tag` belongs to the lender; no layer below touches it.
    """

    __slots__ = ("iov", "length", "offset", "op", "status", "tag")

    def __init__(self, tag: Any = None) -> None:
        self.op: int = Op.READ
        self.offset = 0
        self.length = 0
        self.iov: Sequence[memoryview] = ()
        self.status = PENDING
        self.tag = tag

    def __repr__(self) -> str:
        return f"<{Op(self.op).name} {self.offset}+{self.length} status={self.status}>"


def clear(iov: Sequence[memoryview]) -> None:
    """Fill the memory of a request, or the rest of it, with zeros."""
    for view in iov:
        for start in range(0, len(view), len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            piece[:] = _ZEROS[: len(piece)]


Complete = Callable[[list[Request]], None]
