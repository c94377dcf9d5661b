"""Tests of `xenbackend.block.length`; test_shorter.py checks what a successor refuses."""

from xenbackend.block.length import Length


def test_a_size_is_of_one_file() -> None:
    """A successor finds the size of the same file; for another file there is none yet."""
    memory = memoryview(bytearray(4096))
    first = Length(memory, "file device=1 inode=2")
    assert first.size == 0
    first.size = 1 << 40

    assert Length(memory, "file device=1 inode=2").size == 1 << 40
    assert Length(memory, "file device=1 inode=3").size == 0
