"""What the kernel's two interfaces of asynchronous I/O have in common, on the real kernel; skipped if it lacks one."""

import errno
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import memory
from xenbackend.kernel.aio import Aio
from xenbackend.kernel.uring import Uring

Ring = Aio | Uring
PATIENCE_S = 60.0  # long, as the disk may be busy


@pytest.fixture(params=[Aio, Uring])
def ring(request: pytest.FixtureRequest) -> Iterator[Ring]:
    """Return a ring with the smallest queues."""
    try:
        made: Ring = request.param(2)
    except KernelError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file with 64 KiB, each 4 KiB filled with its own byte."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * 4096 for number in range(16)))
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


def wait_for(ring: Ring, count: int) -> dict[int, int]:
    """Return the results of `count` operations by their user_data; an interrupted wait is repeated."""
    done: dict[int, int] = {}
    give_up = time.monotonic() + PATIENCE_S
    while len(done) < count:
        assert time.monotonic() < give_up, "no completion"
        if isinstance(ring, Uring):
            ring.submit()
            select.select([ring], [], [], PATIENCE_S)
            ring.enter()
        else:
            ring.wait(PATIENCE_S)
        done.update(ring.reap())
    return done


def test_read_and_write(ring: Ring, fd: int) -> None:
    """A single view is read and written at its place, and the result is the count of bytes."""
    arena = memory.allocate(8192)
    arena.view[:4096] = b"w" * 4096
    ring.queue(ring.single[1], fd, 8192, arena.address, 4096, 7)
    ring.queue(ring.single[0], fd, 4096, arena.address + 4096, 4096, 8)

    assert wait_for(ring, 2) == {7: 4096, 8: 4096}
    assert os.pread(fd, 4096, 8192) == b"w" * 4096
    assert bytes(arena.view[4096:]) == b"\1" * 4096


def test_vectors(ring: Ring, fd: int) -> None:
    """Several pieces of memory are one operation, for reads and writes."""
    arena = memory.allocate(4 * 4096)
    arena.view[:512] = b"a" * 512
    arena.view[4096:5120] = b"b" * 1024
    ring.queue_vector(ring.vector[1], fd, 512, [arena.address, 512, arena.address + 4096, 1024], 1)
    assert wait_for(ring, 1) == {1: 1536}
    ring.queue_vector(ring.vector[0], fd, 0, [arena.address + 8192, 1024, arena.address + 12288, 1536], 2)

    assert wait_for(ring, 1) == {2: 2560}
    assert bytes(arena.view[8192:9216]) + bytes(arena.view[12288:13824]) == os.pread(fd, 2560, 0)
    assert os.pread(fd, 1536, 512) == b"a" * 512 + b"b" * 1024


def test_full_queue_is_entered(ring: Ring, fd: int) -> None:
    """More operations than either queue holds are all done, and all results come back."""
    arena = memory.allocate(4096)
    count = 500
    for number in range(count):
        ring.queue(ring.single[0], fd, 0, arena.address, 512, number)

    assert wait_for(ring, count) == dict.fromkeys(range(count), 512)


def test_iovecs_that_run_out(ring: Ring, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that do not fit beside those already queued are submitted without waiting, and overwrite none."""
    arena = memory.allocate(16 * 4096)
    ring._iovecs = ring._iovecs[:4]
    for number in range(16):
        at = arena.address + number * 4096
        ring.queue_vector(ring.vector[0], fd, number * 4096, [at, 512, at + 512, 3584], number)

    assert wait_for(ring, 16) == dict.fromkeys(range(16), 4096)
    assert bytes(arena.view) == os.pread(fd, 16 * 4096, 0)


def test_sync(ring: Ring, fd: int) -> None:
    """An fdatasync has the result 0."""
    ring.queue_sync(fd, 1)

    assert wait_for(ring, 1) == {1: 0}


def test_errors_are_results(ring: Ring) -> None:
    """What the kernel refuses comes back as a negative errno, not as an exception."""
    ring.queue_sync(-1, 9)

    assert wait_for(ring, 1) == {9: -errno.EBADF}


def test_indices_wrap(ring: Ring, fd: int) -> None:
    """Many operations one after the other, more than a queue holds, each get their own result."""
    arena = memory.allocate(4096)
    for number in range(300):
        ring.queue(ring.single[0], fd, 4096 * (number % 16), arena.address, 4096, number)
        assert wait_for(ring, 1) == {number: 4096}
        assert arena.view[0] == number % 16
