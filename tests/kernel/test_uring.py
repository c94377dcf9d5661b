"""Tests of `xenbackend.kernel.uring`, against the real kernel; what it has in common with AIO is in `test_rings`."""

import array
import ctypes
import errno
import os
import threading
from pathlib import Path

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.kernel import uring
from xenbackend.kernel.uring import Uring


def test_absent_io_uring_is_a_clean_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel has no io_uring, making a ring raises KernelError and leaves no descriptor open."""
    before = open_descriptors()
    monkeypatch.setattr(uring, "_SYS_SETUP", 100_000)

    with pytest.raises(KernelError, match="set up io_uring: Function not implemented") as caught:
        Uring()

    assert caught.value.errno == errno.ENOSYS
    assert open_descriptors() == before


def test_close_leaves_nothing_mapped() -> None:
    """A closed ring leaves no mapping behind, which would keep the ring and its operations alive."""
    try:
        Uring(2).close()
    except KernelError as error:
        pytest.skip(str(error))

    assert "io_uring" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("operation", [5, 18, 45, 16])  # FIXED, OPENAT, SOCKET, CONNECT: linux/io_uring.h
def test_a_ring_does_what_it_is_for_and_nothing_else(operation: int) -> None:
    """The ring itself refuses operations that open a file or a socket, which a filter of system calls would not see."""
    try:
        ring = Uring(2)
    except KernelError as error:
        pytest.skip(str(error))
    ring.queue(operation, -100, 0, 0, 0, 7)
    ring.enter()

    assert [(7, -errno.EACCES)] == ring.reap()
    ring.close()


def _bounds() -> tuple[int, int]:
    """Return the limits of the kernel's threads for this thread's rings: for files, and for everything else."""
    fd, _ = uring._setup(2)
    found = array.array("I", (0, 0))  # 0 changes nothing
    address, count = found.buffer_info()
    result = uring._syscall(uring._SYS_REGISTER, fd, uring._REGISTER_IOWQ_MAX_WORKERS, ctypes.c_void_p(address), count)
    code = ctypes.get_errno()
    os.close(fd)
    if result < 0:
        raise KernelError("ask", code)
    return found[0], found[1]


@pytest.mark.rows("R20")
def test_the_kernel_starts_few_threads_for_a_ring() -> None:
    """The kernel's threads are limited before the ring can be used, and the limit cannot be raised again."""
    found: list[tuple[int, int]] = []
    problems: list[KernelError] = []

    def look() -> None:
        try:
            found.append(_bounds())
            ring = Uring(2)
            found.append(_bounds())
            refused = uring._syscall(uring._SYS_REGISTER, ring.fileno(), uring._REGISTER_IOWQ_MAX_WORKERS, None, 2)
            found.append((refused, ctypes.get_errno()))
            ring.close()
        except KernelError as error:
            problems.append(error)

    looking = threading.Thread(target=look)  # the limits are per thread: use one that has had no ring yet
    looking.start()
    looking.join()
    if problems:
        pytest.skip(str(problems[0]))

    before, after, refused = found
    assert before[1] > 1
    assert 0 < after[0] <= min(uring.MOST_WORKERS, 4 * (os.cpu_count() or 1))
    assert 1 == after[1]
    assert (-1, errno.EACCES) == refused
