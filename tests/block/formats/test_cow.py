"""The header of the file of `cow:`."""

from __future__ import annotations

from random import Random

import pytest

from xenbackend.block.formats.beside import HEADER_SIZE, MAX_BLOCK
from xenbackend.block.formats.cow import Header
from xenbackend.errors import DriverError


@pytest.mark.parametrize("size", [512, 4096, 5 << 30, (1 << 62) + 512])
@pytest.mark.parametrize("base", ["", "aio; file inode=7 changed=12", "ram; target=1\udcff"])
def test_a_header_comes_back(size: int, base: str) -> None:
    """A header is read back as it was packed, and header, map and blocks do not overlap."""
    header = Header(size, 65536, base, bytes(range(16)))

    assert header == Header.parse(header.pack())
    assert HEADER_SIZE == len(header.pack())
    assert HEADER_SIZE + header.map_size <= header.data_at
    assert header.data_at % MAX_BLOCK == 0
    assert header.blocks <= header.map_size
    assert size <= header.file_size - header.data_at < size + 65536


def test_any_damage_is_a_sentence() -> None:
    """A header with an altered byte is refused, or has the same content if the byte has no meaning."""
    whole, chance = Header(1 << 30, 4096, "aio; x", b"t" * 16).pack(), Random(1)
    for _ in range(500):
        data = bytearray(whole)
        data[chance.randrange(90)] ^= 1 << chance.randrange(8)
        try:
            found = Header.parse(data)
        except DriverError:
            continue
        assert found == Header(1 << 30, 4096, "aio; x", b"t" * 16)


def test_numbers_that_cannot_be_are_refused() -> None:
    """A block that is not a power of two, a size of 0, or too long a text is refused even with a correct checksum."""
    for header in (
        Header(1 << 20, 5000, "", bytes(16)),
        Header(0, 4096, "", bytes(16)),
        Header(1 << 20, 1 << 30, "", bytes(16)),
    ):
        with pytest.raises(DriverError, match="its header is damaged"):
            Header.parse(header.pack())
    with pytest.raises(DriverError, match="consists of too many files"):
        Header(512, 4096, "x" * 5000, bytes(16)).pack()
