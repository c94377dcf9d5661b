"""Tests of `xenbackend.kernel.uring`, against the real kernel; what it has in common with AIO is in `test_rings`."""

import errno
from pathlib import Path

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.kernel import uring
from xenbackend.kernel.uring import Uring


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


@pytest.mark.parametrize("operation", [5, 18, 45, 16])  # FIXED, OPENAT, SOCKET, CONNECT: linux/io_uring.h
def test_a_ring_does_what_it_is_for_and_nothing_else(operation: int) -> None:
    """What could open a file or a socket past a filter of system calls is refused by the ring itself."""
    try:
        ring = Uring(2)
    except KernelError as error:
        pytest.skip(str(error))
    ring.queue(operation, -100, 0, 0, 0, 7)
    ring.enter()

    assert [(7, -errno.EACCES)] == ring.reap()
    ring.close()
