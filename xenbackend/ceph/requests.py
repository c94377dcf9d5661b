"""Requests to an image in flight: started one by one, taken back in batches when an eventfd says that some are done.

Must not know what a request is beyond its bytes, nor call Python from a thread of librbd's: what is done waits in
librbd's own queue until `poll`.

A request in many pieces goes by a buffer in one piece: to librbd each piece is a thing to allocate, copy and check by
itself, which costs more than a copy. A buffer belongs to its request until that is done. So does the memory of a read
in one piece, of which the caller takes care; what is written from there is copied by librbd at once
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


_LEAST, _LARGEST = 64 << 10, 1 << 20  # bytes of buffers that are kept for others; there is one size for each bit
_SPARE = 8  # buffers of each size


class Requests:
    """Those of one image. A request has a number, which is the caller's."""

    def __init__(self, image: Image) -> None:
        self._quick = load().quick
        self._image = image.handle
        self._buffers: dict[int, tuple[memoryview, Sequence[memoryview], int]] = {}  # with where a read goes, its bytes
        self._spare: dict[int, list[memoryview]] = {}  # by their bytes
        self._events = (ctypes.c_void_p * _BATCH)()
        self._new = ctypes.c_void_p()
        self._new_at = ctypes.byref(self._new)

    def read(self, number: int, offset: int, length: int, iov: Sequence[memoryview]) -> int:
        """Start a read. Here as below units are bytes; returns 0, or a negative errno: it has ended."""
        if len(iov) == 1:
            return self._move(self._quick.rbd_aio_read, number, offset, length, iov[0])
        buffer = self._buffer(length)
        self._buffers[number] = buffer, iov, length
        return self._move(self._quick.rbd_aio_read, number, offset, length, buffer)

    def write(self, number: int, offset: int, length: int, iov: Sequence[memoryview]) -> int:
        """Start a write."""
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
        """Start a flush of all that was written."""
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        return self._started(number, self._quick.rbd_aio_flush(self._image, self._new))

    def discard(self, number: int, offset: int, length: int, _iov: Sequence[memoryview] = ()) -> int:
        """Start a discard."""
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        return self._started(number, self._quick.rbd_aio_discard(self._image, offset, length, self._new))

    def _move(self, call: Call, number: int, offset: int, length: int, view: memoryview) -> int:
        """Start what moves data to or from a view."""
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
        """Return what is done: numbers, each with a negative errno, or what librbd returns: of a read its bytes."""
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
        """Return a buffer of at least so many bytes."""
        size = max(_LEAST, 1 << (length - 1).bit_length())
        spare = self._spare.get(size)
        return spare.pop() if spare else memoryview(bytearray(size))

    def _done_with(self, number: int, result: int) -> None:
        """Give what was read in whole to its pieces, and keep the buffer for another request."""
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
