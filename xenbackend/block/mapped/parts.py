"""Parts of requests, requests of a layer's own, and memory for them.

Must not submit anything.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xenbackend.block.request import PENDING, Request


class Part(Request):
    """A piece of a request, or a request of a layer's own. `done` is called when it is back, and must not keep it.

    To a parent its child's parts are requests like any others: `pool` tells which disk a part belongs to.
    """

    __slots__ = ("done", "pool")

    done: Callable[[Part], None]

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool


class Join:
    """A request that was split: it ends when all its parts have, with the first error among them."""

    __slots__ = ("left", "request", "status")

    def __init__(self, request: Request, left: int) -> None:
        self.request = request
        self.left = left
        self.status = 0


class Pool:
    """Parts that are reused. `lent` is the number of parts in use."""

    def __init__(self) -> None:
        self.lent = 0
        self._free: list[Part] = []

    def take(
        self, op: int, offset: int, length: int, iov: Sequence[memoryview], done: Callable[[Part], None], tag: Any
    ) -> Part:
        """Return a part, which has to be given back by `put`."""
        self.lent += 1
        part = self._free.pop() if self._free else Part(self)
        part.op, part.offset, part.length, part.iov = op, offset, length, iov
        part.done, part.tag, part.status = done, tag, PENDING
        return part

    def split(self, request: Request, lengths: Sequence[int], done: Callable[[Part], None]) -> list[Part]:
        """Return parts of a request, tagged with their `Join`; if it is such a part itself, its own `Join` is used."""
        is_part = isinstance(request, Part) and request.pool is self and isinstance(request.tag, Join)
        join: Join = request.tag if is_part else Join(request, 1)
        join.left += len(lengths) - 1
        parts, offset = [], request.offset
        pieces = cut(request.iov, lengths) if request.iov else ([] for _ in lengths)  # a discard has none
        for length, iov in zip(lengths, pieces, strict=True):
            parts.append(self.take(request.op, offset, length, iov, done, join))
            offset += length
        if is_part:
            self.put(request)  # type: ignore[arg-type]  # it is one
        return parts

    def put(self, part: Part) -> None:
        """Take back a part that has ended."""
        self.lent -= 1
        part.iov, part.tag = (), None
        self._free.append(part)


def allocate(size: int) -> memoryview:
    """Return zeroed memory, aligned to a page as direct I/O needs it."""
    return memoryview(mmap.mmap(-1, size))


def cut(iov: Sequence[memoryview], lengths: Sequence[int]) -> Iterator[list[memoryview]]:
    """Yield, for each length in turn, views of the next so many bytes of `iov`."""
    views = iter(iov)
    view = memoryview(b"")
    for length in lengths:
        piece = []
        missing = length
        while missing:
            if not view:
                view = next(views)
            piece.append(view[:missing])
            view = view[missing:]
            missing -= len(piece[-1])
        yield piece


def tell(part: Part) -> None:
    """Call a part's tag with its status; for use as `Part.done`."""
    part.tag(part.status)


def tell_with(part: Part) -> None:
    """Call the first item of a part's tag with its status and the second item; for use as `Part.done`."""
    then, view = part.tag
    then(part.status, view)
