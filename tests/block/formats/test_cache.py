"""The file of `cache:`."""

from __future__ import annotations

import pytest

from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.cache import DATA_AT, BackHeader, Header
from xenbackend.errors import DriverError


def test_a_header_comes_back_and_touches_no_slot() -> None:
    """A header is read back as it was packed. Slots begin behind it, aligned for direct I/O with any block size."""
    header = Header(10 << 20, 16 << 10, "", bytes(range(16)))

    assert header == Header.parse(header.pack())
    assert HEADER_SIZE <= DATA_AT
    assert DATA_AT + (10 << 20) == header.file_size


def test_tags_and_slots_of_a_write_back_cache_do_not_overlap() -> None:
    """A write-back header is read back, and not taken for the other kind. Tags and slots do not overlap."""
    header = BackHeader(100 << 20, 4096, "below", bytes(range(16)))

    assert header == BackHeader.parse(header.pack())
    assert HEADER_SIZE + 8 * header.blocks <= HEADER_SIZE + header.map_size <= header.data_at
    assert header.data_at + (100 << 20) == header.file_size
    with pytest.raises(DriverError, match="it is not a file of cache:"):
        Header.parse(header.pack())
