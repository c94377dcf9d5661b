"""Headers, regions, metadata and table of VHDX."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from tests.foreign_images import MIB, vhdx
from xenbackend.block.formats.crc32c import crc32c
from xenbackend.block.formats.vhdx import Image, parse
from xenbackend.block.mapped.tables import READABLE, ZERO
from xenbackend.errors import DriverError

SIZE = 4 * MIB
BLOCK = bytes(MIB)
HEADER, REGIONS, METADATA = 128 << 10, 192 << 10, 2 * MIB


def parsed(data: bytes) -> Image:
    """Return what a file says."""
    return parse(lambda offset, length: data[offset : offset + length], len(data))


def patched(offset: int, value: bytes, *, image: bytes = b"") -> bytes:
    """Return an image with other bytes in it. A checksum over them is corrected, and its second copy destroyed."""
    data = bytearray(image or vhdx(SIZE, {}))
    data[offset : offset + len(value)] = value
    for place, length in ((HEADER, 4096), (REGIONS, 64 << 10)):
        if place <= offset < place + length:
            data[place + 4 : place + 8] = bytes(4)
            data[place + 4 : place + 8] = struct.pack("<I", crc32c(data[place : place + length]))
    return bytes(data)


def test_the_table() -> None:
    """Each block is in the file or zeros."""
    data = vhdx(SIZE, {2: BLOCK, 0: BLOCK, 1: None})
    image = parsed(data)
    place, length = image.table_at(0)

    assert [4 * MIB | READABLE, ZERO, 3 * MIB | READABLE, ZERO] == list(image.decode(data[place : place + length]))


@pytest.mark.parametrize(("block_size", "per_table"), [(MIB, 4096), (32 * MIB, 128), (256 * MIB, 16)])
def test_chunks(block_size: int, per_table: int) -> None:
    """Behind the entries of each chunk's blocks is one entry that belongs to no block."""
    image = parsed(vhdx(block_size * per_table + MIB, {}, block_size=block_size))
    step = per_table * 8

    assert [(MIB, step), (MIB + step + 8, 8)] == [image.table_at(0), image.table_at(1)]


def test_the_newer_header_counts() -> None:
    """A header with a wrong checksum is ignored, and the older one counts: here, one with a log."""
    parsed(vhdx(SIZE, {}))
    data = bytearray(vhdx(SIZE, {}))
    data[HEADER + 100] ^= 1
    with pytest.raises(DriverError, match="but has no complete entry"):
        parsed(bytes(data))


@pytest.mark.parametrize("word", [4, 7, 6 | 1 << 40])
def test_entries_that_are_damaged(word: int) -> None:
    """An undefined state, a state for images with parents, and an offset beyond the end of the file are refused."""
    with pytest.raises(DriverError, match="damaged"):
        parsed(vhdx(SIZE, {})).decode(struct.pack("<Q", word))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "does not begin as one"),
        (b"vhdxfile".ljust(MIB, b"\0"), "neither of its headers"),
        (vhdx(SIZE, {}, log=b"l" * 16, ring=bytes(MIB)), "but has no complete entry"),
        (vhdx(SIZE, {}, log=b"l" * 16, ring=bytes(MIB), log_version=1), "its log is of version 1 and not 0"),
        (vhdx(SIZE, {}, log=b"l" * 16, ring=bytes(MIB), log_length=2 * MIB), "its log of 2097152 bytes.*not inside"),
        (vhdx(SIZE, {}, log=b"l" * 16, ring=bytes(MIB), log_length=512 << 10), "its log of 524288 bytes"),
        (vhdx(SIZE, {}, version=2), "version 2 and not 1"),
        (vhdx(SIZE, {}, flags=2), "it has a parent, which is not supported"),
        (vhdx(SIZE, {}, sector_size=1024), "its sectors 1024"),
        (patched(REGIONS + 8, b"\xff\xff"), "region tables"),
        (patched(REGIONS + 8, b"\1"), "a region that every image has is missing"),
        (patched(REGIONS + 16, b"?"), "it requires the region 2dc2773f"),
        (patched(REGIONS + 32, struct.pack("<Q", 1 << 40)), "not inside the file"),
        (patched(REGIONS + 32, struct.pack("<Q", 4096)), "not inside the file"),
        (patched(METADATA, b"?"), "table of metadata is missing"),
        (patched(METADATA + 10, b"\2"), "is missing"),
        (patched(METADATA + 32, b"?"), "it requires the metadata item"),
        (patched(METADATA + 32 + 16, b"\xff\xff\xff"), "not inside the metadata"),
        (patched(METADATA + (64 << 10), b"\1"), "blocks have 1048577 bytes"),
        (patched(METADATA + (64 << 10) + 8, b"\1"), "its disk has 4194305 bytes"),
        (patched(METADATA + (64 << 10) + 13, b"\x0f"), "too small for"),
        (patched(METADATA + (64 << 10) + 13, b"\xff"), "its disk has"),
    ],
)
def test_images_that_are_refused(data: bytes, sentence: str) -> None:
    """Each impossible number is refused by a message that names it."""
    data = bytearray(data)
    if len(data) > REGIONS and b"neither" not in sentence.encode():
        data[256 << 10 : (256 << 10) + 8] = bytes(8)  # so that the other region table cannot be used instead
    with pytest.raises(DriverError, match=sentence):
        parsed(bytes(data))


def test_regions_that_need_not_be_known() -> None:
    """An unknown region is skipped if it is not marked as required, and is refused otherwise."""
    count = struct.pack("<I", 3)
    for flags, is_known in ((0, True), (1, False)):
        entry = UUID(int=7).bytes_le + struct.pack("<QII", 1 << 40, MIB, flags)
        image = patched(REGIONS + 8, count, image=patched(REGIONS + 16 + 2 * 32, entry))
        image = image[: 256 << 10] + bytes(8) + image[(256 << 10) + 8 :]
        if is_known:
            assert SIZE == parsed(image).shape.size
        else:
            with pytest.raises(DriverError, match="it requires the region 00000000-0000-0000-0000-000000000007"):
                parsed(image)


def test_items_that_need_not_be_known() -> None:
    """An unknown metadata item that is not required is skipped."""
    entry = UUID(int=7).bytes_le + struct.pack("<IIII", 0, 0, 0, 0)
    image = patched(METADATA + 10, b"\4", image=patched(METADATA + 32 + 3 * 32, entry))

    assert SIZE == parsed(image).shape.size
