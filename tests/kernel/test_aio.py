"""Tests of `xenbackend.kernel.aio`, against the real kernel; what it has in common with io_uring is in `test_rings`."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import aio, memory
from xenbackend.kernel.aio import Aio


@pytest.fixture
def ring() -> Iterator[Aio]:
    """Return a context for two operations."""
    made = Aio(2)
    yield made
    made.close()


def test_waiting_is_limited(ring: Aio) -> None:
    """A wait with nothing in flight ends after its timeout, and at once when a descriptor becomes ready."""
    near, far = os.pipe()
    ring.queue_poll(near, 5)
    ring.wait(0.001)
    assert ring.reap() == []
    os.write(far, b"x")
    ring.wait(None)

    assert [number for number, _ in ring.reap()] == [5]
    os.close(near)
    os.close(far)


def test_what_the_kernel_does_not_take_waits(ring: Aio) -> None:
    """If the context is full no wait blocks forever: operations beyond it are submitted once there is room."""
    pipes: list[tuple[int, int]] = []
    while not ring.queued:  # the kernel makes a context larger than asked for
        pipes.append(os.pipe())
        ring.queue_poll(pipes[-1][0], len(pipes))
        ring.submit()
    ring.wait(None)
    assert (1, []) == (ring.queued, ring.reap())
    for _, far in pipes:
        os.write(far, b"x")
    seen: set[int] = set()
    while len(seen) < len(pipes):
        ring.wait(10)
        seen |= {number for number, _ in ring.reap()}

    assert (0, set(range(1, len(pipes) + 1))) == (ring.queued, seen)
    for near, far in pipes:
        os.close(near)
        os.close(far)


def test_a_refused_operation_costs_no_other(ring: Aio, tmp_path: Path) -> None:
    """An operation that the kernel refuses comes back with its error; the one queued behind it is done."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 4096)
    fd = os.open(file, os.O_RDONLY)
    arena = memory.allocate(4096)
    ring.queue(99, fd, 0, arena.address, 4096, 1)
    ring.queue(ring.single[0], fd, 0, arena.address, 4096, 2)
    done: dict[int, int] = {}
    while len(done) < 2:
        ring.wait(10)
        done.update(ring.reap())
    os.close(fd)

    assert {1: -errno.EINVAL, 2: 4096} == done


def test_a_context_that_is_not_to_be_had_is_a_clean_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel has no AIO, making a context raises KernelError."""
    monkeypatch.setattr(aio, "_SYS_SETUP", 100_000)

    with pytest.raises(KernelError, match="Function not implemented") as caught:
        Aio()

    assert caught.value.errno == errno.ENOSYS


def test_close_leaves_nothing_mapped() -> None:
    """A closed context leaves no mapping behind, even if a poll was in flight."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("[aio]")

    before = mapped()
    near, far = os.pipe()
    made = Aio(2)
    made.queue_poll(near, 1)
    made.submit()
    during = mapped()
    made.close()
    os.close(near)
    os.close(far)

    assert (before + 1, before) == (during, mapped())
