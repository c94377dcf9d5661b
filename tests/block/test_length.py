"""Tests of `xenbackend.block.length`; test_shorter.py checks what a successor refuses."""

from typing import Any

import pytest

from xenbackend.block.length import SIZE, Lengths


@pytest.fixture
def memory() -> memoryview:
    """Return new memory for the sizes."""
    return memoryview(bytearray(SIZE))


def test_a_size_is_of_one_file(memory: memoryview) -> None:
    """A successor finds the size of the same file; for another file there is none yet."""
    first = Lengths(memory).of("file device=1 inode=2")
    assert first.size == 0
    first.size = 1 << 40

    assert Lengths(memory).of("file device=1 inode=2").size == 1 << 40
    assert Lengths(memory).of("file device=1 inode=3").size == 0


def test_there_is_room_for_the_files_of_two_chains(memory: memoryview) -> None:
    """An image with 32 parents keeps its sizes while another such chain is opened. If there is no more room, sizes are
    forgotten, and never those of other files found.
    """
    lengths = Lengths(memory)
    for number in range(70):
        lengths.of(f"file {number}").size = number + 1
    assert [*range(1, 71)] == [lengths.of(f"file {number}").size for number in range(70)]

    for number in range(70, 300):
        length = lengths.of(f"file {number}")
        assert length.size == 0
        length.size = number + 1
    assert {*range(1, 301), 0} >= {lengths.of(f"file {number}").size for number in range(300)}


def test_a_file_that_is_no_longer_of_the_disk_is_forgotten(memory: memoryview) -> None:
    """When a chain is in service, only its own files stay noted: others may be made anew, and shorter, before they come
    back. All sizes are forgotten when the disk begins.
    """
    for number in range(70):
        Lengths(memory).of(f"file {number}").size = number + 1
    opening = Lengths(memory)
    for number in (5, 7):
        opening.of(f"file {number}")
    opening.of("new").size = 9
    opening.drop_unwanted()
    later = Lengths(memory)
    assert [0, 0, 6, 0, 8, 0, 9] == [
        later.of(each).size for each in (*(f"file {n}" for n in (3, 4, 5, 6, 7, 8)), "new")
    ]

    later.clear()
    assert 0 == Lengths(memory).of("new").size


class Killed:
    """Memory whose process is killed before it notes of which file a row is."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def __getitem__(self, place: slice) -> "memoryview | Killed":
        part = self._content[place]
        return Killed(part) if len(self._content) == SIZE and len(part) > 32 else part

    def __setitem__(self, place: slice, value: bytes) -> None:
        raise KeyboardInterrupt


def test_a_kill_leaves_no_size_of_another_file(memory: memoryview) -> None:
    """If the process is killed while a file takes another one's row, neither has the other one's size afterwards: that
    size must not be left beside the identity of the file that takes the row.
    """
    lengths = Lengths(memory)
    for number in range(102):
        lengths.of(f"file {number}").size = number + 1
    killed: Any = Killed(memory)
    with pytest.raises(KeyboardInterrupt):
        Lengths(killed).of("another file")

    assert [0] == [size for number in range(102) if (size := lengths.of(f"file {number}").size) != number + 1]
