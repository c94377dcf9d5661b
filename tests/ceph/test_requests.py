"""Tests of `xenbackend.ceph.requests`: pieces that are copied through a buffer; tests/engines has all shapes."""

from __future__ import annotations

import ctypes
import errno
from types import SimpleNamespace
from typing import Any, cast

import pytest

from xenbackend.ceph import requests as module
from xenbackend.ceph.requests import _SPARE, Requests

SECTOR = 512


class Librbd:
    """A librbd with a disk in memory that moves data only when a request is answered."""

    def __init__(self) -> None:
        self.disk = bytearray(range(256)) * 65536
        self.numbers: dict[int, int] = {}  # by completion
        self.waiting: list[tuple[int, Any, int]] = []  # completion, what is done, the answer
        self.released: list[int] = []
        self.fails = 0
        self.addresses: list[int] = []

    def rbd_aio_create_completion(self, number: int, _callback: None, new: Any) -> None:
        """Make a completion."""
        completion = len(self.numbers) + 1
        self.numbers[completion] = number
        new._obj.value = completion

    def rbd_aio_write(self, _image: object, offset: int, length: int, address: int, new: ctypes.c_void_p) -> int:
        """Take a write, whose data are read when it is answered."""

        def move() -> None:
            self.disk[offset : offset + length] = ctypes.string_at(address, length)

        return self._take(new, address, move, 0)

    def rbd_aio_read(self, _image: object, offset: int, length: int, address: int, new: ctypes.c_void_p) -> int:
        """Take a read."""
        found = bytes(self.disk[offset : offset + length])
        return self._take(new, address, lambda: ctypes.memmove(address, found, len(found)), len(found))

    def _take(self, new: ctypes.c_void_p, address: int, move: Any, answer: int) -> int:
        if self.fails:
            return -self.fails
        self.addresses.append(address)
        self.waiting.append((new.value or 0, move, answer))
        return 0

    def rbd_poll_io_events(self, _image: object, events: Any, most: int) -> int:
        """Answer all waiting requests."""
        count = min(most, len(self.waiting))
        for place in range(count):
            events[place], move, _ = self.waiting[place]
            move()
        self.answers = {completion: answer for completion, _, answer in self.waiting[:count]}
        del self.waiting[:count]
        return count

    def rbd_aio_get_arg(self, completion: int) -> int:
        """Return the completion's number."""
        return self.numbers[completion]

    def rbd_aio_get_return_value(self, completion: int) -> int:
        """Return the completion's result."""
        return self.answers[completion]

    def rbd_aio_release(self, completion: Any) -> None:
        """Record the release."""
        self.released.append(getattr(completion, "value", completion))


@pytest.fixture
def librbd(monkeypatch: pytest.MonkeyPatch) -> Librbd:
    """Return a stand-in for librbd."""
    library = Librbd()
    monkeypatch.setattr(module, "load", lambda: SimpleNamespace(quick=library))
    return library


@pytest.fixture
def requests(librbd: Librbd) -> Requests:
    """Return the requests of an image."""
    return Requests(cast("Any", SimpleNamespace(handle=librbd)))


def views(*data: bytes) -> list[memoryview]:
    """Return memory for pieces."""
    return [memoryview(bytearray(each)) for each in data]


def test_pieces_are_written_and_read_in_their_order(librbd: Librbd, requests: Requests) -> None:
    """Many pieces of any lengths go to librbd as one buffer, and are read back into their own memory."""
    data = [bytes([number]) * SECTOR * (1 + number % 3) for number in range(1, 40)]
    size = sum(map(len, data))
    assert 0 == requests.write(7, SECTOR, size, views(*data))
    assert [(7, 0)] == requests.poll()
    assert b"".join(data) == librbd.disk[SECTOR : SECTOR + size]
    back = views(*(bytes(len(each)) for each in data))
    assert 0 == requests.read(7, SECTOR, size, back)
    assert [(7, size)] == requests.poll()
    assert data == [bytes(each) for each in back]
    assert 2 == len(librbd.released)


def test_what_a_guest_changes_later_is_not_written(librbd: Librbd, requests: Requests) -> None:
    """A request in many pieces writes the data of the moment when it was started, whenever librbd reads them."""
    pieces = views(b"a" * SECTOR, b"b" * SECTOR)
    requests.write(0, 0, 2 * SECTOR, pieces)
    pieces[0][:] = b"c" * SECTOR
    requests.poll()
    assert b"a" * SECTOR + b"b" * SECTOR == librbd.disk[: 2 * SECTOR]


def test_a_buffer_belongs_to_one_request_at_a_time(librbd: Librbd, requests: Requests) -> None:
    """Each request under way has its own buffer; finished ones are reused, and only a few are kept."""
    count = 3 * _SPARE
    for number in range(count):
        requests.write(number, number * 2 * SECTOR, 2 * SECTOR, views(bytes([number]) * SECTOR, b"x" * SECTOR))
    assert count == len(set(librbd.addresses))
    assert list(range(count)) == [number for number, _ in requests.poll()]
    assert list(range(count)) == [librbd.disk[number * 2 * SECTOR] for number in range(count)]
    used = set(librbd.addresses)
    librbd.addresses.clear()
    for number in range(_SPARE):
        requests.write(number, 0, 2 * SECTOR, views(bytes(SECTOR), bytes(SECTOR)))
    assert set(librbd.addresses) <= used
    assert _SPARE == len(set(librbd.addresses))


def test_large_buffers_are_not_kept(librbd: Librbd, requests: Requests) -> None:
    """A buffer larger than a guest's largest request is not kept."""
    size = 4 << 20
    for _ in range(2):
        assert 0 == requests.read(1, 0, size, views(bytes(size // 2), bytes(size // 2)))
        assert [(1, size)] == requests.poll()
    assert [] == [each for spare in requests._spare.values() for each in spare]


def test_a_read_that_is_cut_short_changes_nothing(librbd: Librbd, requests: Requests) -> None:
    """A read beyond the image's end leaves the pieces unchanged, and reports how many bytes there were."""
    end = len(librbd.disk)
    pieces = views(b"p" * SECTOR, b"p" * SECTOR)
    requests.read(3, end - SECTOR, 2 * SECTOR, pieces)
    assert [(3, SECTOR)] == requests.poll()
    assert [b"p" * SECTOR] * 2 == [bytes(each) for each in pieces]


def test_what_cannot_be_started_holds_nothing(librbd: Librbd, requests: Requests) -> None:
    """If librbd does not accept a request its completion is released, and its buffer can be reused."""
    librbd.fails = errno.ENOMEM
    assert -errno.ENOMEM == requests.write(1, 0, 2 * SECTOR, views(bytes(SECTOR), bytes(SECTOR)))
    assert [1] == librbd.released
    assert 1 == len(next(iter(requests._spare.values())))
    assert not requests._buffers
