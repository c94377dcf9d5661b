"""Requests to an image in flight: started one by one, taken back in batches when an eventfd says that some are done.

Must not know what a request is beyond its bytes, nor call Python from a thread of librbd's: what is done waits in
librbd's own queue until `poll`.

The array of a request's pieces lives until it is done, as librbd reads it until then. So does the memory of a read, of
which the caller takes care; what is written is copied by librbd at once (`rbd_disable_zero_copy_writes`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from xenbackend.ceph.image import Image
from xenbackend.ceph.library import load
from xenbackend.kernel.memory import address_of, addresses

_BATCH = 128
Call = Callable[..., int]


class _Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Requests:
    """Those of one image. A request has a number, which is the caller's."""

    def __init__(self, image: Image) -> None:
        self._quick = load().quick
        self._image = image.handle
        self._pieces: dict[int, object] = {}  # by number
        self._events = (ctypes.c_void_p * _BATCH)()
        self._new = ctypes.c_void_p()
        self._new_at = ctypes.byref(self._new)

    def read(self, number: int, offset: int, length: int, iov: Sequence[memoryview]) -> int:
        """Start a read. Here as below units are bytes; returns 0, or a negative errno: it has ended."""
        return self._move(self._quick.rbd_aio_read, self._quick.rbd_aio_readv, number, offset, length, iov)

    def write(self, number: int, offset: int, length: int, iov: Sequence[memoryview]) -> int:
        """Start a write."""
        return self._move(self._quick.rbd_aio_write, self._quick.rbd_aio_writev, number, offset, length, iov)

    def flush(self, number: int, _offset: int = 0, _length: int = 0, _iov: Sequence[memoryview] = ()) -> int:
        """Start a flush of all that was written."""
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        return self._started(number, self._quick.rbd_aio_flush(self._image, self._new))

    def discard(self, number: int, offset: int, length: int, _iov: Sequence[memoryview] = ()) -> int:
        """Start a discard."""
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        return self._started(number, self._quick.rbd_aio_discard(self._image, offset, length, self._new))

    def _move(self, whole: Call, cut: Call, number: int, offset: int, length: int, iov: Sequence[memoryview]) -> int:
        """Start what moves data: by `whole` where they are in one piece, else by `cut`."""
        new = self._new
        self._quick.rbd_aio_create_completion(number, None, self._new_at)
        if len(iov) == 1:
            view = iov[0]
            result = whole(self._image, offset, length, addresses.get(id(view)) or address_of(view), new)
        else:
            pieces = (_Piece * len(iov))(*[(addresses.get(id(view)) or address_of(view), len(view)) for view in iov])  # type: ignore[misc]
            self._pieces[number] = pieces
            result = cut(self._image, pieces, len(iov), offset, new)
        return self._started(number, result) if result < 0 else 0

    def _started(self, number: int, result: int) -> int:
        if result < 0:
            self._quick.rbd_aio_release(self._new)
            self._pieces.pop(number, None)
        return result

    def poll(self) -> list[tuple[int, int]]:
        """Return what is done: numbers, each with a negative errno, or what librbd returns: of a read its bytes."""
        quick, events, pieces = self._quick, self._events, self._pieces
        done: list[tuple[int, int]] = []
        while (count := quick.rbd_poll_io_events(self._image, events, _BATCH)) > 0:
            for completion in events[:count]:
                number = quick.rbd_aio_get_arg(completion) or 0
                done.append((number, quick.rbd_aio_get_return_value(completion)))
                quick.rbd_aio_release(completion)
                if pieces:
                    pieces.pop(number, None)
            if count < _BATCH:
                break
        return done
