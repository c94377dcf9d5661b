"""The header and the map of VDI."""

from __future__ import annotations

import pytest

from tests.foreign_images import MIB, vdi
from xenbackend.block.formats.vdi import Image, parse
from xenbackend.block.mapped.tables import READABLE, ZERO
from xenbackend.errors import DriverError

SIZE = 4 * MIB
BLOCK = bytes(MIB)


def parsed(data: bytes) -> Image:
    """Return what the header of a file says."""
    return parse(lambda offset, length: data[offset : offset + length], len(data))


def patched(offset: int, value: bytes) -> bytes:
    """Return an image with other bytes in it."""
    data = bytearray(vdi(SIZE, {}))
    data[offset : offset + len(value)] = value
    return bytes(data)


def test_the_map() -> None:
    """Blocks are in the file in the order in which they were written. Free and discarded ones are zeros."""
    data = vdi(SIZE, {2: BLOCK, 0: BLOCK, 1: None})
    image = parsed(data)
    place, length = image.table_at(0)

    assert [1024 + MIB | READABLE, ZERO, 1024 | READABLE, ZERO] == list(image.decode(data[place : place + length]))


def test_tables_of_a_large_map() -> None:
    """A table is 512 entries of the map. The last one may be shorter."""
    image = parsed(vdi(600 * MIB, {}))

    assert [(512, 2048), (2560, 88 * 4)] == [image.table_at(0), image.table_at(1)]


def test_a_block_behind_the_end() -> None:
    """A block beyond the end of the file counts as damage."""
    image = parsed(vdi(SIZE, {}))
    with pytest.raises(DriverError, match="at byte 1024, but the file has only 1024"):
        image.decode(b"\0\0\0\0")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it lacks the signature"),
        (patched(64, b"\0"), "it lacks the signature"),
        (patched(70, b"\2"), "version 2 and not 1"),
        (patched(76, b"\4"), "type 4, which needs a parent"),
        (patched(340, b"\1"), "which is not possible"),
        (patched(344, b"\1"), "which is not possible"),
        (patched(376, b"\0\0\x11\0"), "blocks have 1114112 bytes"),
        (patched(380, b"\1"), "1 bytes between them"),
        (patched(384, b"\3"), "3 blocks of 1048576 bytes do not make a disk of 4194304"),
        (patched(384, b"\xff\xff\xff\xff"), "do not make a disk"),
        (patched(344, b"\0\0\0\x0f") [:340] + b"\0\0\0\x0e\0\0\0\x0f" + vdi(SIZE, {})[348:], "not inside the file"),
    ],
)  # fmt: skip
def test_headers_that_are_refused(data: bytes, sentence: str) -> None:
    """Each impossible number is refused by a message that names it."""
    with pytest.raises(DriverError, match=sentence):
        parsed(data)
