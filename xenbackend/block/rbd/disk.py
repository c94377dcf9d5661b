"""An open image in service: passes requests to librbd and back, watches for late answers and changes of the size.

Must not call anything that waits for the cluster from the worker's loop, nor answer a request if nobody knows whether
it was done.

A client that the cluster refuses, or that has lost its lock or a right of its key, cannot recover by itself: the
process ends, and its successor finds out whether it may write. A client learns the rights of its key when it connects,
so only a new one notices that a right was given back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

from xenbackend.block.driver import Complete, Env
from xenbackend.block.request import AWAY, Op, Request
from xenbackend.ceph.image import BLOCKLISTED, Image
from xenbackend.ceph.requests import Requests
from xenbackend.errors import DriverError

TICK_S = 1.0
SLOW_S = 2  # an answer that takes longer is reported as late
_NO_RIGHT = "the cluster refuses this client, as its key has lost a right"
_LOST = {
    BLOCKLISTED: "the cluster refuses this client: it has been put on the blocklist",
    errno.EROFS: "the worker has lost the image's lock",
    errno.ETIMEDOUT: "an operation has timed out, and may still be carried out",
    errno.EPERM: _NO_RIGHT,
    errno.EACCES: _NO_RIGHT,
}
_FULL = {errno.EDQUOT: errno.ENOSPC}


class RbdDisk:
    """One image in service, of `size` bytes; `complete` gets the finished requests."""

    def __init__(self, env: Env, image: Image, size: int, complete: Complete, *, watches_size: bool) -> None:
        """Have librbd signal its answers. Raises: DriverError."""
        self._env = env
        self._image = image
        self._size = size
        self._complete = complete
        self._watches_size = watches_size
        self._requests = requests = Requests(image)
        self._starts = (requests.read, requests.write, requests.flush, requests.discard)  # by Op
        self._lent: list[Request | None] = []  # by number
        self._free: list[int] = []
        self._began: list[int] = []  # in which tick, by number
        self._ticks = 0
        self._is_late = False
        self._is_looking = self._is_closed = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            image.notify(self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        env.watch(self._fd, self._reap)
        env.call_later(TICK_S, self._tick)

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does."""
        lent, free, starts, began, now = self._lent, self._free, self._starts, self._began, self._ticks
        failed: list[tuple[int, int]] = []
        for request in batch:
            if free:
                number = free.pop()
                lent[number] = request
                began[number] = now
            else:
                number = len(lent)
                lent.append(request)
                began.append(now)
            result = starts[request.op](number, request.offset, request.length, request.iov)
            if result < 0:
                failed.append((number, result))
        if failed:
            self._give_back(failed)

    def close(self) -> None:
        """Stop watching for answers; nothing is in flight, and the caller closes the image next."""
        self._is_closed = True
        self._env.unwatch(self._fd)

    def closed(self) -> None:
        """Close the eventfd: the image is closed, so librbd does not write to it any more."""
        os.close(self._fd)

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)
            self._give_back(self._requests.poll())

    def _give_back(self, ended: Sequence[tuple[int, int]]) -> None:
        lent = self._lent
        done: list[Request] = []
        for number, result in ended:
            request = lent[number]
            if request is None:
                raise RuntimeError(f"librbd has answered request {number} twice")
            lent[number] = None
            self._free.append(number)
            if result >= 0 and (request.op != Op.READ or result == request.length):
                request.status = 0
            else:
                request.status = self._status(request, -result)
            done.append(request)
        if done:
            self._complete(done)

    def _status(self, request: Request, code: int) -> int:
        """Return the status of a request that failed; end the process if this client cannot recover."""
        if code in _LOST:
            self._env.give_up(f"{_LOST[code]}; {request!r} was not done; the next worker does it if it may write")
            return errno.EIO  # there is no successor, so the process goes on
        if code <= 0 or code == errno.EINVAL:  # it reached beyond the image's end
            self._look_at_size()
            return AWAY
        return _FULL.get(code, code)

    def _tick(self) -> None:
        if self._is_closed:
            return
        self._env.call_later(TICK_S, self._tick)
        self._ticks += 1
        ages = [
            self._ticks - began for request, began in zip(self._lent, self._began, strict=True) if request is not None
        ]
        oldest_s = int(max(ages, default=0) * TICK_S)
        if oldest_s >= SLOW_S:
            self._is_late = True
            answers = f"{len(ages)} answer{'s' * (len(ages) != 1)}"
            self._env.report("cluster", f"owes {answers}, the oldest for {oldest_s} s; `ceph health` may say why")
        elif self._is_late:
            self._is_late = False
            self._env.report("cluster", "answers")
        if self._watches_size:
            self._look_at_size()

    def _look_at_size(self) -> None:
        """Ask librbd, in a thread, for the image's size; it has to ask the cluster only if something has changed."""
        if self._is_looking or self._is_closed:
            return
        self._is_looking = True
        sizes: list[int] = []

        def look() -> None:
            with suppress(DriverError):  # requests will meet the same problem
                sizes.append(self._image.size())

        def looked() -> None:
            self._is_looking = False
            if sizes and not self._is_closed:
                self._compare(sizes[0])

        try:
            self._env.run_in_thread(look, looked)
        except RuntimeError:  # the host has no resources for a thread: the next tick tries again
            self._is_looking = False

    def _compare(self, size: int) -> None:
        if size < self._size:
            self._env.give_up(f"the image has shrunk to {size} bytes; the disk has {self._size}")
        elif size > self._size:
            self._env.report("size", f"the image now has {size} bytes; tell the guest with `xenbackend resize`")
