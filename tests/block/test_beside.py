"""A file that a filter keeps beside a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers_block import Machine
from tests.recorded import RecordedFile, state, tears
from xenbackend.block.beside import begin, check_block, have, is_new
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.cow import Header


def test_it_is_new_until_it_is_whole() -> None:
    """Killed anywhere while the file is being begun, torn or not, it is found either new or complete."""
    header, file = Header(64 << 10, 4096, "x", bytes(16)), RecordedFile(bytearray(HEADER_SIZE))
    begin(file, header, size=header.file_size, written=3 * HEADER_SIZE)
    outcomes = set()
    for count, torn in tears(file.log):
        left = RecordedFile(state(bytes(HEADER_SIZE), file.log, count, torn))
        first = left.read_at(0, HEADER_SIZE)
        if is_new(left, first, header.file_size):
            outcomes.add("new")
        else:
            outcomes.add("whole")
            assert header == Header.parse(first)
            assert header.file_size == left.size

    assert {"new", "whole"} == outcomes


def test_its_time_of_change_is_that_before_it_was_opened(tmp_path: Path) -> None:
    """The time of change is the one before the file was opened, so that later changes of the disk are noticed. A file
    is at least as long as a header.
    """
    path, machine = tmp_path / "file", Machine()
    path.write_bytes(bytes(HEADER_SIZE))
    os.utime(path, ns=(0, 12345))
    for wanted in (path, tmp_path / "made"):
        file, changed = have(machine.make_env("x", read_only=False, shareable=False), str(wanted), read_only=False)
        assert HEADER_SIZE == file.size
        assert (wanted == path) == (changed == 12345)
        file.close()
    machine.close()


@pytest.mark.parametrize("block", [0, 2048, 5000, 2 << 20])
def test_odd_blocks_are_refused(block: int) -> None:
    """A block size that is not a power of two from 4 KiB to 1 MiB is refused."""
    check_block(4096)
    with pytest.raises(ValueError, match="it must be 4K, 8K"):
        check_block(block)
