"""An image read and written past the page cache, asynchronously: by Linux AIO, or by threads if there is none.

Must not touch the page cache on the side: a cached write next to a direct one can bring old data back.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xenbackend.block.request import Op, Request
from xenbackend.kernel.blockdev import Alignment, Medium
from xenbackend.worker.image import Image

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor
    from xenbackend.worker.io_queue import IoQueue


class DirectImage(Image):
    """Starts every request at once, except those that cover a block of the medium only in part.

    Such a request runs alone, in a thread: it waits until nothing else is in flight, and later requests are held back,
    because a write of part of a block reads, changes and writes the whole block. Only a frontend that ignores our
    sector size, or an image with smaller sectors than its medium, causes such requests.
    """

    def __init__(self, fd: int, medium: Medium, alignment: Alignment, reactor: Reactor, queue: IoQueue | None) -> None:
        self.how = queue.name if queue else "threads"
        super().__init__(fd, medium, alignment, reactor, queue)
        self._mask = alignment.offset - 1
        self._in_flight = 0
        self._part: Request | None = None  # covers part of a block: waits until it is alone, or runs
        self._held: list[Request] = []  # what came after it

    def submit(self, batch: list[Request]) -> None:
        """Take requests; those that are refused are given back at once, all others later."""
        if self._part is not None:
            self._held += batch
            return
        mask, size = self._mask, self.size
        refused: list[Request] = []
        has_looked = False
        for place, request in enumerate(batch):
            op = request.op
            if op and not has_looked:  # before a write, or a flush of what may be lost
                has_looked = True
                self.extent.look(self.size)
            if op and request.offset + request.length > size:
                self.do(request)
                refused.append(request)
            elif op <= Op.WRITE and (request.offset | request.length) & mask:
                self._part = request
                self._held = batch[place + 1 :]
                break
            else:
                self._in_flight += 1
                self.start(request)
        if refused:
            self.complete(refused)
        self._start_part()

    def finished(self, batch: list[Request]) -> None:
        """Give back requests that have ended, and continue with those that were held back."""
        self._in_flight -= len(batch)
        if batch[0] is self._part:
            self._part = None
            held, self._held = self._held, []
            self.complete(batch)
            if held:
                self.submit(held)
        else:
            self.complete(batch)
            self._start_part()

    def settle(self, request: Request, result: int) -> bool:
        """As `Image.settle`; after EINVAL the request is done again, through memory that direct I/O can use."""
        return super().settle(request, -errno.EAGAIN if result == -errno.EINVAL else result)

    def _start_part(self) -> None:
        if self._part is not None and self._in_flight == 0:
            self._in_flight = 1
            self.start_in_thread(self._part)
