"""Tests of `xenbackend.block.rbd.disk`: librbd's answers, missing answers, and an image whose size changes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest

from tests.helpers_block import StepEnv, read, write
from xenbackend.block.rbd import disk as module
from xenbackend.block.rbd.disk import RbdDisk
from xenbackend.block.request import AWAY, PENDING, Request
from xenbackend.ceph.image import BLOCKLISTED

SIZE = 1 << 20


class Librbd:
    """Stands in for an image and its requests, with answers from the test."""

    def __init__(self) -> None:
        self.bytes = SIZE
        self.started: list[int] = []
        self.refuses = 0
        self.answers: list[tuple[int, int]] = []

    def notify(self, _fd: int) -> None:
        """Do nothing: the test calls the callback itself."""

    def size(self) -> int:
        """Return the image's size."""
        return self.bytes

    def read(self, number: int, _offset: int, _length: int, _iov: Sequence[memoryview]) -> int:
        """Accept a request, or refuse it."""
        if not self.refuses:
            self.started.append(number)
        return -self.refuses

    write = flush = discard = read

    def poll(self) -> list[tuple[int, int]]:
        """Return the answers."""
        answers, self.answers = self.answers, []
        return answers


class Place(StepEnv):
    """An `Env` that records why the disk gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.gave_up: list[str] = []
        self.reap: Callable[[], None] = lambda: None

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Keep the callback."""

        def reap() -> None:
            os.eventfd_write(fd, 1)
            callback()

        self.reap = reap

    def unwatch(self, fd: int) -> None:
        """See `Env`."""

    def give_up(self, why: str) -> None:
        """See `Env`."""
        self.gave_up.append(why)


class Disk:
    """A disk over `Librbd`."""

    def __init__(self) -> None:
        self.librbd = Librbd()
        self.env = Place()
        self.back: list[Request] = []
        self.disk = RbdDisk(cast("Any", self.env), cast("Any", self.librbd), SIZE, self.back.extend, watches_size=True)

    def do(self, request: Request, result: int) -> int:
        """Have a request answered, and return its status."""
        self.disk.submit([request])
        self.librbd.answers = [(self.librbd.started[-1], result)]
        self.env.reap()
        assert [request] == self.back
        self.back.clear()
        return request.status


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Return a disk that is open."""
    monkeypatch.setattr(module, "Requests", lambda image: image)
    found = Disk()
    yield found
    found.disk.close()
    found.disk.closed()


@pytest.mark.parametrize(
    ("request_", "result", "status"),
    [
        (write(0, bytes(512)), 0, 0),
        (read(0, 512, 512), 1024, 0),
        (write(0, bytes(512)), -errno.EIO, errno.EIO),
        (write(0, bytes(512)), -errno.ENOSPC, errno.ENOSPC),
        (write(0, bytes(512)), -errno.EDQUOT, errno.ENOSPC),
        (write(SIZE, bytes(512)), -errno.EINVAL, AWAY),
        (read(SIZE - 512, 1024), 512, AWAY),
        (read(SIZE, 512), 0, AWAY),
    ],
)
def test_answers(disk: Disk, request_: Request, result: int, status: int) -> None:
    """An answer becomes a status. A request beyond the end of an image that has shrunk gets AWAY, and waits."""
    request_.status = PENDING
    assert status == disk.do(request_, result)
    assert [] == disk.env.gave_up


@pytest.mark.parametrize("code", [BLOCKLISTED, errno.EROFS, errno.ETIMEDOUT, errno.EPERM, errno.EACCES])
def test_a_client_of_no_use_gives_up(disk: Disk, code: int) -> None:
    """A worker gives up if it was blocklisted, has lost its lock or a right, or if an operation has timed out."""
    assert errno.EIO == disk.do(write(0, bytes(512)), -code)
    assert 1 == len(disk.env.gave_up)


def test_what_cannot_be_started_is_given_back(disk: Disk) -> None:
    """A request that librbd does not accept comes back at once, and its number is reused."""
    disk.librbd.refuses = errno.ENOMEM
    request = write(0, bytes(512))
    disk.disk.submit([request])
    assert [errno.ENOMEM] == [each.status for each in disk.back]
    disk.back.clear()
    disk.librbd.refuses = 0
    assert 0 == disk.do(write(0, bytes(512)), 0)
    assert [0] == disk.librbd.started


def test_an_answer_that_comes_twice_is_a_bug(disk: Disk) -> None:
    """A second answer to a request is a bug and raises."""
    disk.do(write(0, bytes(512)), 0)
    disk.librbd.answers = [(0, 0)]
    with pytest.raises(RuntimeError, match="twice"):
        disk.env.reap()


def test_what_waits_is_told(disk: Disk) -> None:
    """A fact says for how long an answer is owed, even if other answers come meanwhile. An idle cluster owes none."""
    for _ in range(5):
        disk.env.ring()
    assert "cluster" not in disk.env.facts
    waiting = write(0, bytes(512))
    disk.disk.submit([waiting])
    for _ in range(4):
        disk.env.ring()
        assert 0 == disk.do(read(0, 512), 512)
    assert disk.env.facts["cluster"].startswith("owes 1 answer, the oldest for 4 s")
    disk.librbd.answers = [(0, 0)]
    disk.env.reap()
    assert [waiting] == disk.back
    disk.env.ring()
    assert "answers" == disk.env.facts["cluster"]


def test_a_size_that_changes(disk: Disk) -> None:
    """A larger image is reported as a fact. With a smaller one the worker gives up; its successor compares sizes."""
    disk.librbd.bytes = 2 * SIZE
    disk.env.ring()
    assert str(2 * SIZE) in disk.env.facts["size"]
    assert [] == disk.env.gave_up
    disk.librbd.bytes = SIZE // 2
    disk.env.ring()
    assert [f"the image has shrunk to {SIZE // 2} bytes; the disk has {SIZE}"] == disk.env.gave_up


def test_a_host_without_room_for_a_thread(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no room for the thread that asks for the size, requests are still answered, and it asks later."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    disk.librbd.bytes = 2 * SIZE
    with monkeypatch.context() as patched:
        patched.setattr(disk.env, "run_in_thread", refuse)
        assert AWAY == disk.do(write(SIZE, bytes(512)), -errno.EINVAL)
    assert not disk.env.facts
    disk.env.ring()
    assert str(2 * SIZE) in disk.env.facts["size"]
