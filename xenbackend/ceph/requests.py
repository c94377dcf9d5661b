"""Requests in flight to an image: started one by one, completed in batches when an eventfd says that some are done.

Must not know more about a request than its bytes, nor call Python from a thread of librbd: completed requests wait in
librbd's own queue until `poll`.

A request with several pieces of memory goes through a contiguous buffer, since librbd allocates, copies and checks each
piece separately, which costs more than a copy. A buffer belongs to its request until that is done. The memory of a read
with one piece must stay valid as long, for which the caller is responsible. librbd copies the data of a write at once
(`rbd_disable_zero_copy_writes`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from xenbackend.ceph.image import Image
from xenbackend.ceph.library import load
from xenbackend.kernel.memory import address_of, addresses

_BATCH = 128
Call = Callable[..., int]


_LEAST, _LARGEST = 64 << 10, 1 << 20  # bytes: the sizes of buffers that are reused, which are powers of two
_SPARE = 8  # buffers of each size


class Requests:
    """The requests of one image. The caller gives each request a number."""

    def __init__(self, image: Image) -> None:
        self._quick = load().quick
        self._image = image.handle
        self._buffers: dict[int, tuple[memoryview, Sequence[memoryview], int]] = {}  # buffer, target, bytes
        self._spare: dict[int, list[memoryview]] = {}  # by size
        self._events = (ctypes.c_void_p * _BATCH)()
        self._new = ctypes.c_void_p()
        self._new_at = ctypes.byref(self._new)

    def read(self, number: int, offset: int, length: int, iov: Sequence[memoryview]) -> int:
        """Start a read; offset and length are in bytes. Return 0, or a negative errno if it could not be started."""
        if len(iov) == 1:
            return self._move(self._quick.rbd_aio_read, number, offset, length, iov[0])
        buffer = self._buffer(length)
        self._buffers[number] = buffer, iov, length
        return self._move(self._quick.rbd_aio_read, number, offset, length, buffer)

    def write(self, number: int, offset: int, length: int, iov: Sequence[memoryview]) -> int:
        """Start a write. Arguments and result of this and the following methods are as those of `read`."""
        if len(iov) == 1:
            return self._move(self._quick.rbd_aio_write, number, offset, length, iov[0])
        buffer = self._buffer(length)
        self._buffers[number] = buffer, (), 0
        at = 0
        for piece in iov:
            end = at + len(piece)
            buffer[at:end] = piece
            at = end
        return self._move(self._quick.rbd_aio_write, number, offset, length, buffer)

    def flush(self, number: int, _offset: int = 0, _length: int = 0, _iov: Sequence[memoryview] = ()) -> int:
        """Start a flush of all completed writes."""
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        return self._started(number, self._quick.rbd_aio_flush(self._image, self._new))

    def discard(self, number: int, offset: int, length: int, _iov: Sequence[memoryview] = ()) -> int:
        """Start a discard."""
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        return self._started(number, self._quick.rbd_aio_discard(self._image, offset, length, self._new))

    def _move(self, call: Call, number: int, offset: int, length: int, view: memoryview) -> int:
        """Start a read into or a write from a view, by `call`."""
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        address = addresses.get(id(view)) or address_of(view)
        return self._started(number, call(self._image, offset, length, address, self._new))

    def _started(self, number: int, result: int) -> int:
        if result >= 0:
            return 0
        self._quick.rbd_aio_release(self._new)
        if number in self._buffers:
            self._done_with(number, -1)
        return result

    def poll(self) -> list[tuple[int, int]]:
        """Return the completed requests as (number, result): a negative errno, or the byte count of a read."""
        quick, events, buffers = self._quick, self._events, self._buffers
        done: list[tuple[int, int]] = []
        while (count := quick.rbd_poll_io_events(self._image, events, _BATCH)) > 0:
            for completion in events[:count]:
                number = quick.rbd_aio_get_arg(completion) or 0
                result = quick.rbd_aio_get_return_value(completion)
                done.append((number, result))
                quick.rbd_aio_release(completion)
                if number in buffers:
                    self._done_with(number, result)
            if count < _BATCH:
                break
        return done

    def _buffer(self, length: int) -> memoryview:
        """Return a buffer of at least `length` bytes."""
        size = max(_LEAST, 1 << (length - 1).bit_length())
        spare = self._spare.get(size)
        return spare.pop() if spare else memoryview(bytearray(size))

    def _done_with(self, number: int, result: int) -> None:
        """Copy a complete read from the buffer to its pieces, and keep the buffer for another request."""
        buffer, iov, length = self._buffers.pop(number)
        if result == length:
            at = 0
            for piece in iov:
                end = at + len(piece)
                piece[:] = buffer[at:end]
                at = end
        size = len(buffer)
        if size <= _LARGEST:
            spare = self._spare.setdefault(size, [])
            if len(spare) < _SPARE:
                spare.append(buffer)
