"""offload: a disk of memory behind a thread of its own; an example of a source whose work is done elsewhere.

Synopsis:
    offload:SIZE

Description:
    Requests go to a thread, as they would to a library that has threads of its own, and tells by a descriptor that it
    has finished some. The layer watches that descriptor, and gives requests back from the worker's loop.

Behaviour:
    Reads and writes are done one after the other. Flushes pass. Discards are refused.

Example:
    offload:64M

Limits:
    The disk is lost in the end, and with the worker.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue

from xenbackend.block.driver import Driver, Env, Geometry
from xenbackend.block.options import Size, option
from xenbackend.block.request import Op, Request


class Offload(Driver):
    """Hands requests to a thread, and watches what it says."""

    name = "offload"

    @dataclass(frozen=True, slots=True)
    class Options:
        """How large it is."""

        size: Size = option("bytes of the disk", target=True)

    options: Options

    def open(self, env: Env) -> Geometry:
        """Start the thread."""
        self._disk = memoryview(bytearray(self.options.size))
        self._todo: SimpleQueue[Request | None] = SimpleQueue()
        self._done: deque[Request] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        env.watch(self._bell, self._rung)
        return Geometry(size=self.options.size, read_only=env.read_only)

    def submit(self, batch: list[Request]) -> None:
        """Let the thread have the batch."""
        for request in batch:
            self._todo.put(request)

    def close(self) -> None:
        """End the thread; nothing is in flight."""
        self.env.unwatch(self._bell)
        self._todo.put(None)
        self._thread.join()
        os.close(self._bell)

    def _rung(self) -> None:
        """Give back what is done, from the loop: `complete` is for no other thread."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return  # it was for the callback before this one
        done = [self._done.popleft() for _ in range(len(self._done))]
        if done:
            self.complete(done)

    def _work(self) -> None:
        while (request := self._todo.get()) is not None:
            request.status = self._do(request)
            self._done.append(request)
            os.eventfd_write(self._bell, 1)

    def _do(self, request: Request) -> int:
        if request.op == Op.DISCARD:
            return errno.EOPNOTSUPP
        at = request.offset
        for view in request.iov:
            here = self._disk[at : at + len(view)]
            if request.op == Op.WRITE:
                here[:] = view
            else:
                view[:] = here
            at += len(view)
        return 0
