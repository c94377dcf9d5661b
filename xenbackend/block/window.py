"""A filter that shows a range of the layer below as a disk of its own: the base of `offset:` and `partition:`.

Must not know where the range comes from, nor let a request reach a byte outside it.
"""

from __future__ import annotations

from dataclasses import replace

from xenbackend.block.driver import Filter, Geometry
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.errors import DriverError
from xenbackend.units import format_size


class Window(Filter):
    """Moves each request by the beginning of the range. A subclass calls `show` when it is opened."""

    _start = 0
    _size = 0

    def show(self, start: int, length: int) -> Geometry:
        """Show `length` bytes from `start` on. Raises: DriverError if there is no such range of whole sectors."""
        below = self.below
        assert below is not None  # noqa: S101 - the chain opens a filter after the layer below it
        if length <= 0 or start < 0 or start + length > below.size:
            raise DriverError(
                f"the disk would be bytes {start} to {start + length}, but the layer below has only {below.size} "
                f"({format_size(below.size)})"
            )
        for what, value in (("begin", start), ("end", start + length)):
            if value % below.sector_size:
                raise DriverError(
                    f"it would {what} at byte {value}, inside a sector: those of the layer below have "
                    f"{below.sector_size} bytes"
                )
        self._start, self._size = start, length
        self._spare: list[Request] = []
        if start % below.physical_sector_size:
            self.env.report(
                "alignment",
                f"it begins inside a physical sector of {below.physical_sector_size} bytes: writes are slow",
            )
        step = below.discard_granularity
        return replace(below, size=length, discard_alignment=(below.discard_alignment - start) % step if step else 0)

    def submit(self, batch: list[Request]) -> None:
        """Pass on a request of our own for each one, moved to its place below."""
        start, spare = self._start, self._spare
        passed: list[Request] = []
        for request in batch:
            own = spare.pop() if spare else Request()
            own.op = op = request.op
            own.offset = request.offset + start if op != Op.FLUSH else 0
            own.length, own.iov = request.length, request.iov
            own.status, own.tag = PENDING, request
            passed.append(own)
        self.next.submit(passed)  # type: ignore[union-attr]  # a filter in a chain has a layer below

    def on_complete(self, batch: list[Request]) -> None:
        """Give back the requests for which these were sent down."""
        back: list[Request] = []
        for own in batch:
            request = own.tag
            request.status = own.status
            own.tag, own.iov = None, ()
            back.append(request)
        self._spare += batch
        self.complete(back)
