"""The file of `cache:`."""

from __future__ import annotations

from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.cache import DATA_AT, Header


def test_a_header_comes_back_and_touches_no_slot() -> None:
    """Slots begin behind it, where direct I/O with any block may."""
    header = Header(10 << 20, 16 << 10, "", bytes(range(16)))

    assert header == Header.parse(header.pack())
    assert HEADER_SIZE <= DATA_AT
    assert DATA_AT + (10 << 20) == header.file_size
