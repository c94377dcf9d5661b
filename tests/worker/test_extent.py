"""Tests of `xenbackend.worker.extent`; test_files.py checks what requests for lost bytes get."""

import os
import select
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
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


def test_a_thread_that_finds_the_loss_wakes_the_loop(fd: int) -> None:
    """If a thread finds that something was cut off, the loop is told even if it sleeps."""
    with closing(Reactor()) as reactor:
        extent, told = extent_of(fd, reactor), list[tuple[int, int]]()
        extent.on_short = lambda had, has: told.append((had, has))
        os.truncate(fd, 4096)
        with ThreadPoolExecutor() as threads:
            assert threads.submit(fails, lambda: extent.check(SIZE)).result()
        assert [reactor.fileno()] == select.select([reactor.fileno()], [], [], 0)[0]
        reactor.call_soon(reactor.stop)
        reactor.run()

        assert [(SIZE, 4096)] == told


def test_a_block_device_is_always_there(fd: int) -> None:
    """A block device, whose node has no size, has lost nothing."""
    medium = replace(blockdev.examine(fd, "", read_only=False), is_device=True)
    with closing(Reactor()) as reactor:
        extent = Extent(fd, medium, reactor)
        os.truncate(fd, 0)
        extent.check(SIZE)

        assert (SIZE, False) == (extent.look(SIZE), extent.is_short)


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


@pytest.mark.parametrize("way", ["look", "check"])
def test_a_file_that_grows_while_it_is_measured_is_not_short(
    fd: int, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """F2: a size that was measured before we made the file longer does not make a healthy file short."""
    real, grows = blockdev.measure, []

    def measure(of: int) -> Callable[[], int]:
        return lambda: measured_before_it_grows(real(of)())

    def measured_before_it_grows(size: int) -> int:
        while grows:
            os.truncate(fd, grows[0])
            extent.grown(grows.pop())
        return size

    monkeypatch.setattr(blockdev, "measure", measure)
    with closing(Reactor()) as reactor:
        extent = extent_of(fd, reactor)
        grows.append(2 * SIZE)
        if way == "look":
            assert extent.look(SIZE) == SIZE
        else:
            extent.check(SIZE)

        assert (2 * SIZE, False, []) == (extent.end, extent.is_short, grows)
        extent.check(2 * SIZE)


@pytest.mark.parametrize("way", ["look", "check"])
@pytest.mark.parametrize("grows_in_thread", [True, False])
def test_threads_that_grow_and_measure(fd: int, way: str, grows_in_thread: bool) -> None:
    """F2: however a thread that makes the file longer and one that measures it meet, the file is not short."""
    with closing(Reactor()) as reactor:
        extent, ends = extent_of(fd, reactor), range(2 * SIZE, 4000 * SIZE, SIZE)
        has_ended = threading.Event()

        def grow() -> None:
            for end in ends:
                os.truncate(fd, end)
                extent.grown(end)
            has_ended.set()

        def measure() -> None:
            while not has_ended.is_set() and not extent.is_short:
                extent.look(SIZE) if way == "look" else extent.check(SIZE)

        here, there = (measure, grow) if grows_in_thread else (grow, measure)
        former = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        thread = threading.Thread(target=there)
        thread.start()
        here()
        thread.join()
        sys.setswitchinterval(former)

        assert (ends[-1], False) == (extent.end, extent.is_short)


def test_what_was_lost_does_not_come_back_by_growing(fd: int) -> None:
    """F2: if the file was cut off just before we made it longer, what was lost stays lost."""
    with closing(Reactor()) as reactor:
        extent = extent_of(fd, reactor)
        os.truncate(fd, 4096)
        extent.look(SIZE)
        os.truncate(fd, 2 * SIZE)
        extent.grown(2 * SIZE)

        assert extent.look(2 * SIZE) == 4096
        assert fails(lambda: extent.check_read(4097))


def test_a_file_that_cannot_be_measured(fd: int) -> None:
    """D6: if the file system cannot say how long the file is, as a shut-down XFS, `look` raises nothing, and takes
    nothing for lost: the request itself gets the error. `check` raises it.
    """
    with closing(Reactor()) as reactor:
        extent = extent_of(gone := os.dup(fd), reactor)
        os.close(gone)

        assert (SIZE, False) == (extent.look(SIZE), extent.is_short)
        assert fails(lambda: extent.check(SIZE))


def test_no_server_is_asked_for_the_size(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check before a write does without the `fstat` at which NFS first writes all changed pages back. Each thread has
    memory of its own for the answer.
    """

    def refuse(_fd: int) -> os.stat_result:
        raise AssertionError("fstat")

    with closing(Reactor()) as reactor, ThreadPoolExecutor(4) as threads, tempfile.TemporaryFile() as other:
        os.truncate(other.fileno(), 1)
        extent = extent_of(fd, reactor)
        monkeypatch.setattr(os, "fstat", refuse)
        calls = [lambda: extent.check(SIZE), lambda: blockdev.size_of(other.fileno())] * 500
        assert {None, 1} == set(threads.map(lambda call: call(), calls))

        assert (False, SIZE) == (extent.is_short, blockdev.size_of(fd))
