"""An open image with blocking I/O: the base class of the faster ways, and what `sync:` uses.

Must not choose how an image is opened, and must never let a write make a file grow: only `grow` does. So if another
program makes a file shorter while it is in service, what was lost stays an error: if a write behind the new end made
the file grow again, the rest would be read as zeros.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from xenbackend.block.driver import Complete
from xenbackend.block.places import Places
from xenbackend.block.request import Op, Request, clear
from xenbackend.errors import XenbackendError
from xenbackend.kernel import blockdev
from xenbackend.kernel.blockdev import Alignment, Medium
from xenbackend.units import round_up
from xenbackend.worker.extent import Extent, shorter

if TYPE_CHECKING:
    from xenbackend.block.length import Length
    from xenbackend.loop.reactor import Reactor
    from xenbackend.worker.io_queue import IoQueue

MAX_IOVECS = 1024  # IOV_MAX: pieces of one call
_ANYTHING = Alignment(1, 1)


class Image:
    """A file or block device, open and locked; implements `block.driver.File` by one blocking call after the other.

    Args:
        fd: owned from now on, with the lock that hangs on it.
        medium: what it is.
        alignment: what its direct I/O demands; None if it goes through the page cache.
        reactor: the worker's loop.
        queue: of asynchronous I/O, if there is one; used by subclasses.

    path    its name, for sentences; empty if that is not known
    extent  how much there is of it
    length  its size, noted for successors; None: nobody notes it
    drops   `write_at`, `sync` and `grow` leave the file as it is; set by a check of a chain, which serves nothing
    """

    how = "blocking calls"

    def __init__(
        self, fd: int, medium: Medium, alignment: Alignment | None, reactor: Reactor, queue: IoQueue | None
    ) -> None:
        self.fd = fd
        self.path = ""
        self.length: Length | None = None
        self.drops = False
        self.medium = medium
        self.size = medium.size
        self.sector_size = medium.sector_size
        self.physical_sector_size = medium.physical_sector_size
        self.can_discard = medium.can_discard
        self.discard_granularity = medium.discard_granularity
        self.complete: Complete = _nobody
        self.on_close: Callable[[], None] | None = None
        self.mode = f"{'O_DIRECT' if alignment else 'page cache'}, {self.how}"
        self.extent = Extent(fd, medium, reactor)
        self._alignment = alignment or _ANYTHING
        self._reactor = reactor
        self._queue = queue

    def submit(self, batch: list[Request]) -> None:
        """Do every request before returning."""
        for request in batch:
            self.do(request)
        self.complete(batch)

    def do(self, request: Request) -> None:
        """Do one request by blocking calls and set its status; every retry and odd case ends here. For any thread."""
        try:
            self._check_range(request)
            _STEPS[request.op](self, request)
            request.status = 0
        except OSError as error:
            request.status = error.errno or errno.EIO

    def read_mapped(
        self, batch: list[Request], places: Places
    ) -> tuple[list[Request], list[tuple[Request, int]], list[Request]]:
        """See `block.driver.HostFile`: past the page cache nothing is there at once."""
        late: list[tuple[Request, int]] = []
        rest: list[Request] = []
        for request in batch:
            place = places.find(request.offset, request.length)
            if place < 0 or request.op:  # Op.READ is 0
                rest.append(request)
            else:
                late.append((request, place))
        return [], late, rest

    def do_moved(self, batch: list[Request], by: int) -> tuple[list[Request], list[Request]]:  # noqa: ARG002 - others need it
        """See `block.driver.HostFile`: past the page cache nothing is done at once."""
        return [], batch

    def start(self, request: Request) -> None:
        """Do one request without blocking, by the queue or in a thread; `finished` gets it back."""
        if self._queue is None or request.op == Op.DISCARD or self.extent.is_short:
            self.start_in_thread(request)
        else:
            self._queue.start(self, request)

    def start_in_thread(self, request: Request) -> None:
        """Do one request in a thread; `finished` gets it back."""
        self._reactor.run_in_thread(partial(self.do, request), partial(self.finished, [request]))

    def finished(self, batch: list[Request]) -> None:
        """Take back requests that were started."""
        self.complete(batch)

    def settle(self, request: Request, result: int) -> bool:
        """Set the status for a result of the queue that is not the full length; False if it was started again."""
        if request.op == Op.FLUSH and result == 0:
            request.status = 0
        elif result < 0 and -result not in {errno.EAGAIN, errno.EINTR}:
            request.status = -result
        else:  # short, or EAGAIN: do all of it again, in a thread
            self.start_in_thread(request)
            return False
        return True

    def read_at(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes, blocking; fewer at the end of the file. Raises: OSError."""
        length = max(0, min(length, self.size - offset))
        with self._named(f"read of {length} bytes at {offset}"):
            start, block = self._read_blocks(offset, length)
        return bytes(block[offset - start : offset - start + length])

    def write_at(self, offset: int, data: bytes) -> None:
        """Write all of `data`, blocking. Raises: OSError; EINVAL where the file would grow."""
        if offset + len(data) > self.size:
            raise OSError(errno.EINVAL, "a write past the end of an image")
        if self.drops:
            return
        with self._named(f"write of {len(data)} bytes at {offset}"):
            self.extent.check(offset + len(data))
            self._write_blocks(offset, [memoryview(data)], len(data))

    def sync(self) -> None:
        """Make everything durable, blocking. Raises: OSError."""
        if self.drops:
            return
        with self._named("flush"):
            self._sync()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Make an OSError say what failed, and for which file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{what}: {error.strerror}", self.path or None) from error

    @property
    def allocated(self) -> int:
        """See `block.driver.File`."""
        return os.fstat(self.fd).st_blocks * 512

    def next_data(self, offset: int) -> tuple[int, int]:
        """See `block.driver.File`. This moves the descriptor's own offset, which no request uses."""
        start = self._seek(offset, os.SEEK_DATA)
        return start, self._seek(start, os.SEEK_HOLE) if start < self.size else start

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return min(self.size, os.lseek(self.fd, offset, whence))
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is only a hole from here on, or the file became shorter
                self.extent.check(self.extent.end)
                return self.size
            if error.errno == errno.EINVAL:  # a block device or file system that cannot tell: all of it is data
                return offset if whence == os.SEEK_DATA else self.size
            raise

    def grow(self, size: int, tail: bytes = b"") -> None:
        """Make the file longer, as `block.driver.File.grow` says. For any thread, one at a time. Raises: OSError."""
        if size <= self.size:
            return
        if self.medium.is_device:
            raise OSError(errno.ENOSPC, "a block device cannot grow")
        step = self._alignment.offset
        start = (size - len(tail)) // step * step
        if size % step or start < self.size:
            raise OSError(errno.EINVAL, "direct I/O cannot make the file end there")
        if self.drops:
            self.size = size
            return
        self.extent.check(self.extent.end)
        if tail:
            block = memoryview(mmap.mmap(-1, size - start))
            block[-len(tail) :] = tail
            if _whole(os.pwritev, self.fd, [block], start):
                raise OSError(errno.EIO, "a write ended early")
        else:
            os.ftruncate(self.fd, size)
        self.extent.grown(size)
        if self.length is not None:
            self.length.size = size
        self.size = size

    def close(self) -> None:
        """Release the file and its lock; nothing is in flight."""
        fd, self.fd = self.fd, -1
        os.close(fd)
        if self.on_close is not None:
            self.on_close()

    def is_inside(self, request: Request) -> bool:
        """Return whether the range ends inside the image."""
        return request.offset + request.length <= self.size

    def _covers_part(self, offset: int, length: int) -> bool:
        """Return whether a range begins or ends inside a block of the medium."""
        return bool((offset | length) & self._alignment.offset - 1)

    def _check_range(self, request: Request) -> None:
        end = request.offset + request.length
        if request.op != Op.READ:
            if end > self.size:
                raise OSError(errno.EINVAL, "past the end of an image")
            self.extent.check(end)
        else:
            self.extent.check_read(end)

    def _read(self, request: Request) -> None:
        if self._covers_part(request.offset, request.length):
            self._read_copied(request)
            return
        had = self.extent.end  # before the call: where another thread makes the file longer meanwhile, nothing is lost
        try:
            rest = _whole(os.preadv, self.fd, request.iov, request.offset)
        except OSError as error:
            if error.errno != errno.EINVAL or self._alignment is _ANYTHING:
                raise
            self._read_copied(request)
            return
        if rest and request.offset + request.length - sum(map(len, rest)) < had:
            self.extent.check(had)
            raise shorter()
        clear(rest)  # past the end: a frontend must not see what the buffer held before

    def _read_copied(self, request: Request) -> None:
        """Read through aligned memory what direct I/O cannot: an unaligned range, or into memory that is unsuitable."""
        start, block = self._read_blocks(request.offset, request.length)
        block = block[request.offset - start :]
        for view in request.iov:
            view[:] = block[: len(view)]
            block = block[len(view) :]

    def _write(self, request: Request) -> None:
        if self._covers_part(request.offset, request.length):
            self._write_blocks(request.offset, request.iov, request.length)
            return
        try:
            if _whole(os.pwritev, self.fd, request.iov, request.offset):
                raise OSError(errno.EIO, "a write ended early")
        except OSError as error:
            if error.errno != errno.EINVAL or self._alignment is _ANYTHING:
                raise
            self._write_blocks(request.offset, request.iov, request.length)

    def _flush(self, request: Request) -> None:  # noqa: ARG002 - a step has a request
        self._sync()

    def _sync(self) -> None:
        os.fdatasync(self.fd)
        self.extent.flushed()

    def _discard(self, request: Request) -> None:
        if not self.can_discard:
            raise OSError(errno.EOPNOTSUPP, "discard")
        blockdev.discard(self.fd, self.medium, request.offset, request.length)

    def _read_blocks(self, offset: int, length: int) -> tuple[int, memoryview]:
        """Read the aligned blocks around a range into aligned memory; return where they begin, and their bytes."""
        step = self._alignment.offset
        start = offset // step * step
        size = round_up(offset + length, step) - start
        block = memoryview(mmap.mmap(-1, max(1, size)))[:size]
        inside = block[: max(0, self.extent.end - start)]
        if _whole(os.preadv, self.fd, [inside], start):
            self.extent.check(self.extent.end)
            raise shorter()
        return start, block

    def _write_blocks(self, offset: int, pieces: Sequence[memoryview], length: int) -> None:
        """Write through aligned memory.

        If the range is not aligned, the rest of the blocks at its ends is read and written back: nobody else may write
        to those blocks meanwhile.
        """
        if self._covers_part(offset, length):
            start, block = self._read_blocks(offset, length)
        else:
            start, block = offset, memoryview(mmap.mmap(-1, max(1, length)))[:length]
        place = offset - start
        for piece in pieces:
            block[place : place + len(piece)] = piece
            place += len(piece)
        if _whole(os.pwritev, self.fd, [block], start):
            raise OSError(errno.EIO, "a write ended early")


_STEPS: tuple[Callable[[Image, Request], None], ...] = (
    Image._read, Image._write, Image._flush, Image._discard,  # noqa: SLF001 - by the number of the operation
)  # fmt: skip


def _nobody(batch: list[Request]) -> None:
    raise XenbackendError(f"an image was given requests before it had an owner: {batch!r}")


def _whole(
    call: Callable[[int, Sequence[memoryview], int], int], fd: int, pieces: Sequence[memoryview], offset: int
) -> list[memoryview]:
    """Repeat preadv or pwritev until every piece is done or the file ends; return what is left. Raises: OSError."""
    left = [piece for piece in pieces if len(piece)]
    while left:
        moved = call(fd, left[:MAX_IOVECS], offset)
        if moved == 0:
            break
        offset += moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if moved:
            left[0] = left[0][moved:]
    return left
