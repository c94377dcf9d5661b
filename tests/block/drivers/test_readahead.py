"""The driver readahead."""

from __future__ import annotations

import errno
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.helpers_block import Bottom, Machine, StepEnv, content, discard, read, write
from xenbackend.block.driver import Geometry
from xenbackend.block.drivers.readahead import Readahead
from xenbackend.block.request import Op, Request
from xenbackend.errors import ChainError

SIZE = 1 << 20
PIECE = 64 << 10


class Disk(Bottom):
    """A source that does a request when the test says so, with the content of that moment."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = bytearray(data)
        self.fails = 0

    @property
    def held(self) -> list[Request]:
        """Return the requests that are not done yet."""
        return [request for batch in self.batches for request in batch]

    def do(self, request: Request) -> None:
        """Do one request."""
        for batch in self.batches:
            if request in batch:
                batch.remove(request)
        end = request.offset + request.length
        if request.op == Op.READ:
            request.iov[0][:] = self.data[request.offset : end]
        elif request.op != Op.FLUSH:
            self.data[request.offset : end] = content(request) if request.op == Op.WRITE else bytes(request.length)
        request.status = self.fails if request.op == Op.READ else 0
        self.complete([request])


def opened(data: bytes) -> tuple[Readahead, Disk, list[Request]]:
    """Return an open filter over a disk, and the list of finished requests."""
    driver, disk, back = Readahead(Readahead.Options(size=PIECE)), Disk(data), list[Request]()
    driver.env, driver.next, driver.below = StepEnv(), disk, Geometry(len(data))
    driver.open(driver.env)
    disk.complete, driver.complete = driver.on_complete, back.extend
    return driver, disk, back


def streamed(data: bytes) -> tuple[Readahead, Disk, list[Request]]:
    """Return the same after three sequential reads that are done, so that a piece is being read ahead."""
    driver, disk, back = opened(data)
    for place in range(3):
        driver.submit([read(place * 4096, 4096)])
        disk.do(disk.held[0])
    return driver, disk, back


def test_a_guest_that_reads_in_order_is_ahead_of(machine: Machine, tmp_path: Path) -> None:
    """If a disk is read sequentially, hardly any read goes down, and all data are right up to the last byte."""
    path, data = tmp_path / "img", Random(1).randbytes(SIZE - 1536)
    path.write_bytes(data)
    chain = machine.open(f"readahead:size=64K|log:{tmp_path}/rec|aio:{path}")
    found = b""
    while len(found) < len(data):
        request = read(len(found), min(4096, len(data) - len(found)))
        assert [0] == machine.do(chain, request)
        found += content(request)
    figures = chain.layers[0].driver.figures()
    chain.close()

    assert data == found
    assert figures["hits"] > 240
    assert figures["read_ahead_bytes"] <= len(data)


def test_it_is_closed_once_its_own_reads_are_back(machine: Machine) -> None:
    """D1: what is being read ahead is back before the layers below are closed, as when another chain is put in."""
    chain = machine.open("readahead:size=64K|delay:read=50ms|ram:1M")
    ahead: Any = chain.layers[0].driver
    for place in range(4):
        assert [0] == machine.do(chain, read(place * 4096, 4096))
    was_under_way = len(ahead._under_way)
    chain.close()

    assert (1, 0) == (was_under_way, len(ahead._under_way))


def test_random_reads_are_left_alone() -> None:
    """Nothing is read ahead for random reads."""
    driver, disk, back = opened(bytes(SIZE))
    for place in (0, 7, 3, 4, 100, 50, 51):
        driver.submit([read(place * 4096, 4096)])
        disk.do(disk.held[0])

    assert (7, {"hits": 0, "read_ahead_bytes": 0}) == (len(back), driver.figures())


@pytest.mark.parametrize("kind", [Op.WRITE, Op.DISCARD])
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("is_read_first", [True, False])
def test_a_write_is_never_overtaken(kind: Op, order: tuple[int, ...], *, is_read_first: bool) -> None:
    """F2: while a piece is read ahead, a read of it and a write to it are done in any order. A read after the write was
    answered returns what was written.
    """
    driver, disk, back = streamed(b"o" * SIZE)
    change = write(12288, b"n" * 4096) if kind == Op.WRITE else discard(12288, 4096)
    first = read(12288, 4096)
    for request in [first, change] if is_read_first else [change, first]:
        driver.submit([request])
    for place in order:
        if len(disk.held) > place and change in disk.held + back:
            disk.do(disk.held[place])
    while disk.held:
        disk.do(disk.held[0])
    assert change in back
    assert content(first) in (b"o" * 4096, b"n" * 4096, bytes(4096))
    later = read(12288, 4096)
    driver.submit([later])
    while disk.held:
        disk.do(disk.held[0])

    assert (b"n" * 4096 if kind == Op.WRITE else bytes(4096)) == content(later)
    assert sorted(map(id, [first, change, later])) == sorted(map(id, back[3:]))


def test_nothing_is_read_ahead_beside_a_write() -> None:
    """While a write is in flight anywhere on the disk, nothing is read ahead."""
    driver, disk, _ = opened(bytes(SIZE))
    driver.submit([write(40960, bytes(512))])
    for place in range(5):
        driver.submit([read(place * 4096, 4096)])
    assert [Op.WRITE] + [Op.READ] * 5 == [request.op for request in disk.held]
    while disk.held:
        disk.do(disk.held[0])
    driver.submit([read(20480, 4096)])

    assert [4096, PIECE] == [request.length for request in disk.held]


def test_a_piece_that_fails_is_nobodys_error() -> None:
    """If reading ahead fails, the reads that waited for it are sent down and get the answer of the layer below."""
    driver, disk, back = streamed(b"d" * SIZE)
    waiting = read(12288, 4096)
    driver.submit([waiting])
    disk.fails = errno.EIO
    disk.do(disk.held[0])
    disk.fails = 0
    assert waiting in disk.held
    disk.do(waiting)

    assert (0, b"d" * 4096) == (back[-1].status, content(waiting))


def test_a_stream_that_has_ended_keeps_nothing_from_the_next() -> None:
    """A guest that starts to read sequentially in another place, even an earlier one, has that read ahead."""
    driver, disk, _ = streamed(bytes(SIZE))
    while disk.held:
        disk.do(disk.held[0])
    for start in (800 << 10, 400 << 10, 0):
        hits = driver.figures()["hits"]
        for place in range(8):
            driver.submit([read(start + place * 4096, 4096)])
            while disk.held:
                disk.do(disk.held[0])
        assert driver.figures()["hits"] >= hits + 5
        assert len(driver._pieces) <= 2


def test_sizes_are_bounded() -> None:
    """A piece must be 64 KiB to 16 MiB."""
    for size in ("4K", "1G"):
        with pytest.raises(ChainError, match="it must be 64 KiB to 16 MiB"):
            Machine().open(f"readahead:size={size}|null:1G")
