"""`Request`, one operation in flight in a chain. The lender keeps a pool of them.

Must not know a segment, a grant, a sector or a file.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

PENDING = -1  # `Request.status` while it is lent
_ZEROS = bytes(64 * 1024)

# Statuses with a meaning of their own (D6); no file system returns the first two.
IMAGE_DAMAGED = errno.ENOTRECOVERABLE  # the write would have destroyed more of a damaged image; nothing was written
CACHE_LOST = errno.EBADSLT  # only a cache has data that were answered, and its file cannot be used now
AWAY = errno.ENOLINK  # the disk's server is away: nobody knows whether it did the request, which has to be sent again


class Op(IntEnum):
    """The operation of a request. There is no barrier: the engine turns one into drain, flush, write, flush."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3


class Request:
    """One operation in flight, lent downward by `submit` and given back by `complete`.

    `offset` and `length` are in bytes, multiples of 512, and inside the disk that the layer announced.
    `iov` holds writable memoryviews of bytes, whose lengths add up to `length` (READ, WRITE); empty otherwise.
    `status` is `PENDING` while the request is lent, then 0 if it was done, or a positive errno.
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
    """Fill the memory of these views, all or the rest of a request's, with zeros."""
    for view in iov:
        for start in range(0, len(view), len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            piece[:] = _ZEROS[: len(piece)]


Complete = Callable[[list[Request]], None]
