"""Tests of `xenbackend.block.length`; test_shorter.py checks what a successor refuses."""

from typing import Any

import pytest

from xenbackend.block.length import SIZE, Length


def test_a_size_is_of_one_file() -> None:
    """A successor finds the size of the same file; for another file there is none yet."""
    memory = memoryview(bytearray(SIZE))
    first = Length(memory, "file device=1 inode=2")
    assert first.size == 0
    first.size = 1 << 40

    assert Length(memory, "file device=1 inode=2").size == 1 << 40
    assert Length(memory, "file device=1 inode=3").size == 0


def test_there_is_room_for_the_files_of_two_chains() -> None:
    """An image with 32 parents keeps its sizes while another such chain is opened. If there is no more room, sizes are
    forgotten, and never those of other files found.
    """
    memory = memoryview(bytearray(SIZE))
    for number in range(70):
        Length(memory, f"file {number}").size = number + 1
    assert [*range(1, 71)] == [Length(memory, f"file {number}").size for number in range(70)]

    for number in range(70, 300):
        length = Length(memory, f"file {number}")
        assert length.size == 0
        length.size = number + 1
    assert {*range(1, 301), 0} >= {Length(memory, f"file {number}").size for number in range(300)}


class Killed:
    """Memory whose process is killed before it notes of which file a row is."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def __getitem__(self, place: slice) -> "memoryview | Killed":
        part = self._content[place]
        return Killed(part) if len(self._content) == SIZE and len(part) > 32 else part

    def __setitem__(self, place: slice, value: bytes) -> None:
        raise KeyboardInterrupt


def test_a_kill_leaves_no_size_of_another_file() -> None:
    """If the process is killed while a file takes another one's row, neither has the other one's size afterwards: that
    size must not be left beside the identity of the file that takes the row.
    """
    content = memoryview(bytearray(SIZE))
    for number in range(102):
        Length(content, f"file {number}").size = number + 1
    killed: Any = Killed(content)
    with pytest.raises(KeyboardInterrupt):
        Length(killed, "another file")

    assert [0] == [size for number in range(102) if (size := Length(content, f"file {number}").size) != number + 1]
