"""Tests of `xenbackend.kernel.uring`, against the real kernel; skipped where it has no io_uring for us."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.kernel import memory, uring
from xenbackend.kernel.uring import OP_READ, OP_READV, OP_WRITE, OP_WRITEV, Uring


@pytest.fixture
def ring() -> Iterator[Uring]:
    """Return a ring with the smallest queues."""
    try:
        made = Uring(2)
    except KernelError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """Return a file with 64 KiB, each 4 KiB of its own byte."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * 4096 for number in range(16)))
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


def wait_for(ring: Uring, count: int) -> dict[int, int]:
    """Return the results of `count` operations by their user_data."""
    done: dict[int, int] = {}
    while len(done) < count:
        before = len(done)
        ring.wait(10)
        done.update(ring.reap())
        assert len(done) > before, "no completion within ten seconds"
    return done


def test_waiting_is_limited(ring: Uring) -> None:
    """A wait without anything in flight ends when its time is up, and a descriptor ends it at once."""
    near, far = os.pipe()
    ring.queue_poll(near, 5)
    ring.wait(0.001)
    assert ring.reap() == []
    os.write(far, b"x")
    ring.wait(None)

    assert [number for number, _ in ring.reap()] == [5]
    os.close(near)
    os.close(far)


def test_read_and_write(ring: Uring, fd: int) -> None:
    """A single view is read and written at its place, and the result is the count of bytes."""
    arena = memory.allocate(8192)
    arena.view[:4096] = b"w" * 4096
    ring.queue(OP_WRITE, fd, 8192, arena.address, 4096, 7)
    ring.queue(OP_READ, fd, 4096, arena.address + 4096, 4096, 8)

    assert wait_for(ring, 2) == {7: 4096, 8: 4096}
    assert os.pread(fd, 4096, 8192) == b"w" * 4096
    assert bytes(arena.view[4096:]) == b"\1" * 4096


def test_vectors(ring: Uring, fd: int) -> None:
    """Several pieces of memory are one operation, in both directions."""
    arena = memory.allocate(4 * 4096)
    arena.view[:512] = b"a" * 512
    arena.view[4096:5120] = b"b" * 1024
    ring.queue_vector(OP_WRITEV, fd, 512, [arena.address, 512, arena.address + 4096, 1024], 1)
    assert wait_for(ring, 1) == {1: 1536}
    ring.queue_vector(OP_READV, fd, 0, [arena.address + 8192, 1024, arena.address + 12288, 1536], 2)

    assert wait_for(ring, 1) == {2: 2560}
    assert bytes(arena.view[8192:9216]) + bytes(arena.view[12288:13824]) == os.pread(fd, 2560, 0)
    assert os.pread(fd, 1536, 512) == b"a" * 512 + b"b" * 1024


def test_full_queue_is_entered(ring: Uring, fd: int) -> None:
    """More operations than the submission queue holds are all done, and more than the other queue holds come back."""
    arena = memory.allocate(4096)
    count = 500
    for number in range(count):
        ring.queue(OP_READ, fd, 0, arena.address, 512, number)

    assert wait_for(ring, count) == dict.fromkeys(range(count), 512)


def test_iovecs_that_run_out(ring: Uring, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that do not fit beside those already queued wait for nothing and overwrite none of them."""
    arena = memory.allocate(16 * 4096)
    ring._iovecs = ring._iovecs[:4]
    for number in range(16):
        at = arena.address + number * 4096
        ring.queue_vector(OP_READV, fd, number * 4096, [at, 512, at + 512, 3584], number)

    assert wait_for(ring, 16) == dict.fromkeys(range(16), 4096)
    assert bytes(arena.view) == os.pread(fd, 16 * 4096, 0)


def test_sync_and_punch(ring: Uring, fd: int) -> None:
    """An fdatasync ends with 0, and a punched hole reads as zeros in a file that keeps its size."""
    ring.queue_sync(fd, 1)
    assert wait_for(ring, 1) == {1: 0}
    ring.queue_punch(fd, 4096, 1 << 20, 2)
    result = wait_for(ring, 1)[2]
    if result == -errno.EOPNOTSUPP:
        pytest.skip("no holes in this file system")

    assert result == 0
    assert os.fstat(fd).st_size == 65536
    assert os.pread(fd, 61440, 4096) == bytes(61440)


def test_errors_are_results(ring: Uring) -> None:
    """What the kernel refuses comes back as a negative errno, not as an exception."""
    ring.queue_sync(-1, 9)

    assert wait_for(ring, 1) == {9: -errno.EBADF}


def test_indices_wrap(ring: Uring, fd: int) -> None:
    """Rounds without number leave nothing behind: the ring's own indices only ever grow, modulo their size."""
    arena = memory.allocate(4096)
    for number in range(300):
        ring.queue(OP_READ, fd, 4096 * (number % 16), arena.address, 4096, number)
        assert wait_for(ring, 1) == {number: 4096}
        assert arena.view[0] == number % 16


def test_absent_io_uring_is_a_clean_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no io_uring for us, making a ring raises KernelError and leaves no descriptor behind."""
    before = open_descriptors()
    monkeypatch.setattr(uring, "_SYS_SETUP", 100_000)

    with pytest.raises(KernelError, match="set up io_uring: Function not implemented") as caught:
        Uring()

    assert caught.value.errno == errno.ENOSYS
    assert open_descriptors() == before


def test_close_leaves_nothing_mapped() -> None:
    """A closed ring leaves no mapping behind: one would keep the ring, and with it what is in flight, alive."""
    try:
        Uring(2).close()
    except KernelError as error:
        pytest.skip(str(error))

    assert "io_uring" not in Path("/proc/self/maps").read_text()


def test_older_kernels_get_fewer_flags(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refuses the newest set-up flags gets a ring without them, which works the same."""
    monkeypatch.setattr(uring, "_SETUP_DEFER_TASKRUN", 1 << 31)
    try:
        ring = Uring(2)
    except KernelError as error:
        pytest.skip(str(error))
    test_full_queue_is_entered(ring, fd)
    ring.close()
