"""Tests of `xenbackend.worker.extent`; test_files.py checks what requests for lost bytes get."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from xenbackend.kernel import blockdev
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.extent import Extent

SIZE = 8192


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """Return an open file of `SIZE` bytes."""
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(opened, SIZE)
    yield opened
    os.close(opened)


def extent_of(fd: int, reactor: Reactor) -> Extent:
    """Return what there is of a file."""
    return Extent(fd, blockdev.examine(fd, "", read_only=False), reactor)


def fails(call: Callable[[], object]) -> bool:
    """Return whether a call raises OSError."""
    with suppress(OSError):
        call()
        return False
    return True


def test_what_was_cut_off_stays_lost(fd: int) -> None:
    """A file that became shorter has lost the rest, also when it becomes longer again; it is told of once, in the loop,
    and one flush fails. The smallest size that was seen counts.
    """
    with closing(Reactor()) as reactor:
        extent, told = extent_of(fd, reactor), []
        extent.on_short = lambda had, has: told.append((had, has))
        bounds = [extent.look(SIZE)]
        for size in (5000, 7000, 4096, SIZE):
            os.truncate(fd, size)
            bounds.append(extent.look(SIZE))
        assert [] == told
        reactor.call_soon(reactor.stop)
        reactor.run()

        assert [SIZE, 5000, 5000, 4096, 4096] == bounds
        assert [(SIZE, 5000)] == told
        assert [False, True] == [fails(lambda end=end: extent.check(end)) for end in (4096, 4097)]
        assert [False, True] == [fails(lambda end=end: extent.check_read(end)) for end in (4096, 4097)]
        assert [True, False] == [fails(extent.flushed) for _ in range(2)]


def test_a_file_that_we_make_longer(fd: int) -> None:
    """What we have added is there, and may be lost like the rest."""
    with closing(Reactor()) as reactor:
        extent = extent_of(fd, reactor)
        os.truncate(fd, 2 * SIZE)
        extent.grown(2 * SIZE)
        extent.check(2 * SIZE)
        os.truncate(fd, SIZE)

        assert (2 * SIZE, False) == (extent.end, extent.is_short)
        assert fails(lambda: extent.check(SIZE + 1))
        assert extent.is_short
