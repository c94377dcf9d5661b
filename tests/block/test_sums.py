"""Checksums of blocks, in memory and in a file. tests/block/drivers/test_checksum.py has kills and failing media."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random

import pytest

from tests.helpers_block import StepEnv
from tests.recorded import RecordedFile
from xenbackend.block.beside import begin
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.checksum import PAGE, SUMS, Header
from xenbackend.block.request import Op
from xenbackend.block.sums import Sums

HEADER = Header(3 * SUMS * 4096, 4096, "", b"t" * 16)


class Kept:
    """The sums of a disk in a file whose requests the test steps through. The test ends the disk's flushes."""

    def __init__(self) -> None:
        self.env = StepEnv()
        self.file = RecordedFile(bytearray(HEADER_SIZE), Random(1))
        begin(self.file, HEADER, size=HEADER.file_size, written=HEADER.sums_at)
        self.flushes: list[Callable[[int], None]] = []
        self.said: list[int] = []
        self.start()

    def start(self) -> Sums:
        """Open the sums, as a successor does if the memories are kept."""
        self.sums = Sums(self.env, self.file, HEADER, self.flushes.append)
        self.file.complete = lambda batch: [self.sums.take(each) for each in batch]
        return self.sums

    def run(self) -> None:
        """Do everything that is waiting."""
        while self.file.step():
            pass

    def rest(self) -> None:
        """Let the time pass after which pages are settled, and do everything that follows from it."""
        for _ in range(2):
            self.env.ring()
            while self.flushes:
                self.flushes.pop()(0)
            self.run()

    def alter(self, block: int, value: int) -> None:
        """Alter a block and give it a sum."""
        if not self.sums.doubt(block, block, self.said.append):
            self.run()
        self.sums.begin(block, block)
        self.sums.put(block, [value])
        self.sums.end(block, block)

    def anew(self) -> Sums:
        """Return the sums that are found if only the file is left."""
        file = RecordedFile(bytearray(self.file.bytes))
        return Sums(StepEnv(), file, HEADER, lambda done: done(0))


def test_what_has_rested_is_known_from_the_file_alone() -> None:
    """A page that has been settled is known from the file alone. A page in doubt is lost with the memory."""
    kept = Kept()
    kept.alter(5, 7)
    kept.alter(SUMS + 5, 8)
    kept.rest()
    assert not kept.sums.is_in_doubt
    kept.alter(SUMS + 6, 9)
    found = kept.anew()

    assert [7, 0, 0] == [found.values[block] for block in (5, SUMS + 5, SUMS + 6)]
    assert found.is_in_doubt
    assert [7, 8, 9] == [kept.start().values[block] for block in (5, SUMS + 5, SUMS + 6)]


def test_a_page_stays_in_doubt_while_something_alters_it() -> None:
    """A page stays in doubt as long as something alters it, or waits to do so, however long that takes."""
    kept = Kept()
    kept.alter(0, 1)
    assert kept.sums.doubt(1, 1, kept.said.append)
    for _ in range(4):
        kept.rest()
    assert kept.sums.is_in_doubt
    assert 0 == kept.anew().values[0]
    kept.sums.end(1, 1)
    kept.rest()
    kept.rest()

    assert not kept.sums.is_in_doubt
    assert 1 == kept.anew().values[0]


def test_a_flush_that_failed_settles_nothing() -> None:
    """If the flush of the disk fails, the page stays in doubt, and settling it is tried again."""
    kept = Kept()
    kept.alter(0, 1)
    for _ in range(2):
        kept.env.ring()
        for done in kept.flushes:
            done(errno.EIO)
        kept.flushes.clear()
        kept.run()
    assert kept.sums.is_in_doubt
    kept.rest()

    assert not kept.sums.is_in_doubt


@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH])
def test_a_log_that_cannot_be_written_is_told(op: Op) -> None:
    """If the log cannot be written, the request to alter a block learns that, and the page is not in doubt."""
    kept = Kept()
    kept.file.fails = lambda request: errno.ENOSPC if request.op == op else 0
    assert not kept.sums.doubt(0, 0, kept.said.append)
    kept.run()

    assert [errno.ENOSPC] == kept.said
    assert not kept.sums.is_in_doubt
    kept.file.fails = lambda request: 0
    assert not kept.sums.doubt(0, 0, kept.said.append)
    kept.run()
    assert [errno.ENOSPC, 0] == kept.said


def test_closed_in_order_nothing_is_in_doubt_that_was_flushed() -> None:
    """After an orderly close, flushed blocks are not in doubt. Blocks altered later are: power may still fail."""
    kept = Kept()
    kept.alter(0, 1)
    flushed = kept.sums.flushing()
    flushed()
    kept.alter(SUMS, 2)
    kept.sums.close(writes=True)
    found = kept.anew()

    assert [1, 0] == [found.values[block] for block in (0, SUMS)]


def test_a_flush_covers_what_was_altered_before_it() -> None:
    """A flush covers only alterations that had ended when it was sent."""
    kept = Kept()
    assert not kept.sums.doubt(0, 0, kept.said.append)
    kept.run()
    kept.sums.begin(0, 0)
    flushed = kept.sums.flushing()
    kept.sums.put(0, [1])
    kept.sums.end(0, 0)
    flushed()
    kept.sums.close(writes=True)

    assert 0 == kept.anew().values[0]


def test_only_pages_of_the_file_that_are_more_than_holes_are_read() -> None:
    """Only those pages of the file are read that are not holes."""
    kept = Kept()
    kept.alter(2 * SUMS + 1, 5)
    kept.rest()
    kept.rest()
    reads: list[tuple[int, int]] = []
    plain = kept.file.read_at

    def read_at(place: int, length: int) -> bytes:
        reads.append((place, length))
        return plain(place, length)

    last = HEADER.sums_at + 2 * PAGE
    kept.file.read_at = read_at
    kept.file.next_data = lambda offset: (max(offset, last), last + PAGE)
    kept.env = StepEnv()

    assert 5 == kept.start().values[2 * SUMS + 1]
    assert [(HEADER_SIZE, PAGE), (last, PAGE)] == reads
