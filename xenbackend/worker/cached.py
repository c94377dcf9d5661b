"""An image behind the page cache: data in the cache are copied at once, the rest goes to io_uring or a thread.

Must not know how the image was opened. Buffered writes never go to io_uring: it hands them to kernel threads, which
costs two and a half times as much as the plain call.
"""

from __future__ import annotations

import errno
import os
from itertools import pairwise

from xenbackend.block.places import Places
from xenbackend.block.request import Op, Request
from xenbackend.worker.image import MAX_IOVECS, Image

_LARGEST_JOINED = 32 * 1024  # bytes; to join larger requests costs more than the call that it saves


class CachedImage(Image):
    """Reads and writes within `submit`, by one system call for each request or run of neighbours.

    Reads do not wait for the medium there if the file system supports RWF_NOWAIT.

    Invariants: R10: a read is answered 0 only after every byte of its iov was written.
    """

    how = "preadv and pwritev"

    _read_flags = os.RWF_NOWAIT  # 0 once the file system has refused it

    def submit(self, batch: list[Request]) -> None:
        """Take requests; those that the page cache can serve are given back before this returns."""
        if self.extent.is_short:
            for request in batch:
                self.start(request)
            return
        done, odd = self._do_now(batch, 0)
        for request in odd:
            self._do_odd(request, done)
        if done:
            self.complete(done)

    def do_moved(self, batch: list[Request], by: int) -> tuple[list[Request], list[Request]]:
        """See `block.driver.HostFile`."""
        return ([], batch) if self.extent.is_short else self._do_now(batch, by)

    def read_mapped(
        self, batch: list[Request], places: Places
    ) -> tuple[list[Request], list[tuple[Request, int]], list[Request]]:
        """See `block.driver.HostFile`. This loop runs for every read of a cache."""
        if self.extent.is_short:
            return super().read_mapped(batch, places)
        preadv, fd, flags = os.preadv, self.fd, self._read_flags
        bits, start, stop, shifts = places.bits, places.start, places.stop, places.shifts
        count, block, inside = len(shifts), 1 << bits, (1 << bits) - 1
        late: list[tuple[Request, int]] = []
        rest: list[Request] = []
        for request in batch:
            offset, length = request.offset, request.length
            place = offset + shifts[(offset >> bits) % count]  # as `Places.find`, without its call
            if request.op or not start <= place < stop or (offset & inside) + length > block:  # Op.READ is 0
                rest.append(request)
                continue
            try:
                if preadv(fd, request.iov, place, flags) == length:
                    request.status = 0
                    continue
            except OSError:  # not in the page cache, or an error, which the caller gets when it submits the read
                pass
            late.append((request, place))
        return [request for request in batch if not request.status] if late or rest else batch, late, rest

    def _do_now(self, batch: list[Request], by: int) -> tuple[list[Request], list[Request]]:
        """Execute requests, `by` bytes further on; return those that a system call has completed, and the others."""
        done: list[Request] = []
        if len(batch) > 1 and (_are_neighbours(batch[0], batch[1]) or _are_neighbours(batch[-2], batch[-1])):
            batch = self._do_joined(batch, done, by)
        odd = self._do_each(batch, by)
        done = done + batch if done else batch
        return [request for request in done if request not in odd] if odd else done, odd

    def _do_each(self, batch: list[Request], by: int) -> list[Request]:
        """Execute each request that a single call completes, and return the others. Nearly all requests end here."""
        preadv, pwritev, fd, flags = os.preadv, os.pwritev, self.fd, self._read_flags
        end = -1  # where a request has to end, once the first write has asked for it
        odd: list[Request] = []
        for request in batch:
            op = request.op
            moved = -1
            try:
                if op == 0:  # Op.READ, and below Op.WRITE: looking the names up would cost a tenth of the loop
                    moved = preadv(fd, request.iov, request.offset + by, flags)
                elif op == 1:
                    if end < 0:
                        end = self.extent.look(self.size) - by
                    if request.offset + request.length <= end:
                        moved = pwritev(fd, request.iov, request.offset + by)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP and op == Op.READ:
                    flags = self._read_flags = 0
            if moved == request.length:
                request.status = 0
            else:
                odd.append(request)
        return odd

    def _do_odd(self, request: Request, done: list[Request]) -> None:
        """Execute a request that the fast path did not: not cached, short, failed, a flush, a discard, past the end."""
        if request.op == Op.WRITE or (request.op == Op.DISCARD and not self.is_inside(request)):
            self.do(request)
            done.append(request)
        else:
            if request.op == Op.FLUSH:
                self.extent.look(self.size)
            self.start(request)

    def _do_joined(self, batch: list[Request], done: list[Request], by: int) -> list[Request]:
        """Execute each run of neighbours by one call; return the requests in no run, or in a run that failed."""
        rest: list[Request] = []
        for run in _runs(batch):
            if len(run) > 1 and self._do_run(run, by):
                done += run
            else:
                rest += run
        return rest

    def _do_run(self, run: list[Request], by: int) -> bool:
        first, last = run[0], run[-1]
        iov = [view for request in run for view in request.iov]
        start, end = first.offset + by, last.offset + last.length + by
        try:
            if first.op == Op.READ:
                moved = os.preadv(self.fd, iov, start, self._read_flags)
            elif end <= self.extent.look(self.size):
                moved = os.pwritev(self.fd, iov, start)
            else:
                return False
        except OSError:  # then each request is executed by itself, and gets its own status
            return False
        if start + moved != end:
            return False
        for request in run:
            request.status = 0
        return True


def _are_neighbours(one: Request, other: Request) -> bool:
    return (
        one.offset + one.length == other.offset
        and one.op == other.op
        and one.op <= Op.WRITE
        and one.length <= _LARGEST_JOINED
    )


def _runs(batch: list[Request]) -> list[list[Request]]:
    """Divide a batch into runs of neighbours, none with more views than one call accepts."""
    runs = [[batch[0]]]
    pieces = len(batch[0].iov)
    for before, request in pairwise(batch):
        pieces += len(request.iov)
        if _are_neighbours(before, request) and pieces <= MAX_IOVECS:
            runs[-1].append(request)
        else:
            runs.append([request])
            pieces = len(request.iov)
    return runs
