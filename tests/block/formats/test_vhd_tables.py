"""Tests of `xenbackend.block.formats.vhd_tables`."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from tests import vhd_images
from tests.block.formats.test_vhd import reader
from xenbackend.block.formats import vhd
from xenbackend.block.formats.vhd import Footer, Header
from xenbackend.block.formats.vhd_tables import (
    UNUSED,
    Batmap,
    batmap_ranges,
    check_table,
    pack_batmap,
    pack_bitmap,
    pack_entries,
    read_batmap,
    read_table,
    unpack_bitmap,
    used_blocks,
)
from xenbackend.errors import DriverError

MIB = 1 << 20
HEADER = Header(1536, 64, 2 * MIB)
STRIDE = (512 + 2 * MIB) // 512


def headers_of(data: bytes) -> tuple[Footer, Header, array[int]]:
    """Return what an image's headers and table say."""
    footer, _ = vhd.read_footer(reader(data), len(data))
    header = vhd.read_header(reader(data), footer, len(data))
    return footer, header, read_table(reader(data), footer, header)


def batmap_of(data: bytes) -> Batmap | None:
    """Return an image's batmap."""
    return read_batmap(reader(data), *headers_of(data))


def test_entries_are_big_endian() -> None:
    """Entries are sector numbers of four bytes, big-endian. All bits set means that there is no block."""
    data = vhd_images.image(9 * MIB, {0: {}, 4: {}})
    _, _, table = headers_of(data)

    assert [4, UNUSED, UNUSED, UNUSED, 4 + STRIDE] == list(table)
    assert b"\0\0\0\4" + b"\xff" * 12 + b"\0\0\x10\5" == data[1536:1556] == pack_entries(table)


@pytest.mark.parametrize("missing", [1, 2, 4, 21])
def test_a_file_that_ends_inside_its_table(missing: int) -> None:
    """A table that the file contains only in part is refused, even if the part ends inside an entry."""
    data = vhd_images.image(9 * MIB, {0: {}, 4: {}})
    footer, header, _ = headers_of(data)
    with pytest.raises(DriverError, match="the file ends inside its table"):
        read_table(reader(data[: 1536 + 5 * 4 - missing]), footer, header)


def test_blocks_far_from_one_another() -> None:
    """Blocks in use are found anywhere in a table, also at the edges of stretches that are skipped as a whole."""
    used = [511, 1024, 1999]
    table = array("I", [UNUSED]) * 2000
    for block in used:
        table[block] = 7

    assert used == list(used_blocks(table))
    assert [] == list(used_blocks(array("I", [UNUSED]) * 2000))


def test_the_first_sector_is_the_highest_bit() -> None:
    """Each byte of a bitmap stands for eight sectors, the first in the highest bit. A packed bitmap is read back."""
    present = bytearray(4096)
    present[0] = present[7] = present[9] = present[4095] = 1
    packed = pack_bitmap(present, 512)

    assert (0x81, 0x40, 0x01) == (packed[0], packed[1], packed[511])
    for seed in range(20):
        data = Random(seed).randbytes(512)
        assert data == pack_bitmap(unpack_bitmap(data, 4096), 512)
    assert b"\xf0" + bytes(511) == pack_bitmap(unpack_bitmap(b"\xff" * 512, 4), 512)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([4, 4], "its blocks overlap"),
        ([4, 4 + STRIDE - 1], "its blocks overlap"),
        ([0, UNUSED], "overlaps what the image keeps at 0"),
        ([3, UNUSED], "overlaps what the image keeps at 1536"),
        ([8000, UNUSED], "overlaps what the image keeps at 5000192"),
        ([5 * STRIDE, UNUSED], "begins at 10488320, beyond the end of the file"),
        ([UNUSED - 1, UNUSED], "beyond the end of the file"),
        ([4 + number * STRIDE for number in range(9)], "more blocks than fit into the file"),
    ],
)
@pytest.mark.rows("D10")
def test_tables_that_cannot_be(entries: list[int], sentence: str) -> None:
    """D10: blocks that overlap each other, a header or a table, or that are outside of the file, are refused."""
    metadata = [(0, 1536), (1536, 1792), (5_000_192, 5_000_704)]
    with pytest.raises(DriverError, match=sentence):
        check_table(array("I", entries), HEADER, metadata, 5 * STRIDE * 512)


def test_the_end_of_the_blocks() -> None:
    """The table gives the end of the last block, which may be beyond the end of the file if a writer was killed."""
    end = 4 * 512 + 2 * STRIDE * 512

    assert end == check_table(array("I", [4 + STRIDE, 4, UNUSED]), HEADER, [(0, 1792)], end)
    assert end == check_table(array("I", [4 + STRIDE, 4, UNUSED]), HEADER, [(0, 1792)], end - MIB)
    assert 0 == check_table(array("I", [UNUSED]), HEADER, [(0, 1792)], 2048)


def test_a_batmap_comes_back() -> None:
    """The batmap says which blocks are full. A batmap that we pack is what libvhd would write, and is read back."""
    data = vhd_images.image(9 * MIB, {0: {}, 2: {}, 4: {}}, full=[0, 4])
    batmap = batmap_of(data)
    assert batmap is not None
    assert b"\1\0\0\0\1" == batmap.blocks
    header, bits = pack_batmap(batmap, b"\1\0\1\0\1")
    altered = bytearray(data)
    altered[batmap.offset :][: batmap.size] = altered[batmap.offset : batmap.offset + batmap.size] = bits
    altered[batmap.header_offset : batmap.header_offset + 512] = header
    again = batmap_of(bytes(altered))

    assert vhd_images.image(9 * MIB, {0: {}, 2: {}, 4: {}}, full=[0, 2, 4]) == altered
    assert again is not None
    assert b"\1\0\1\0\1" == again.blocks


@pytest.mark.parametrize(
    ("change", "ranges"),
    [
        ("none", [(2048, 2560), (2560, 3072)]),
        ("sum", [(2048, 2560), (2560, 3072)]),
        ("longer", [(2048, 2560), (2560, 2560 + 5 * 512)]),
        ("cookie", []),
        ("creator", []),
        ("cut", []),
    ],
)
def test_where_a_batmap_is(change: str, ranges: list[tuple[int, int]]) -> None:
    """The space that a batmap claims is kept free of blocks even if the batmap is not trusted."""
    creator = b"win " if change == "creator" else b"tap\0"
    data = bytearray(vhd_images.image(9 * MIB, {0: {}}, full=[0], creator=creator))
    footer, header, _ = headers_of(bytes(data))
    place = {"sum": 2560, "cookie": 2048, "longer": 2048 + 19}.get(change)
    if place is not None:
        data[place] ^= 4
    if change == "cut":
        del data[2048 + 511 :]

    assert ranges == batmap_ranges(reader(bytes(data)), footer, header)


@pytest.mark.parametrize("change", ["sum", "cookie", "version", "absent", "creator", "none"])
def test_a_batmap_that_cannot_be_trusted_is_left_alone(change: str) -> None:
    """A batmap with a wrong checksum, with missing blocks, or of an unknown version or writer is ignored."""
    full = [0, 1] if change == "absent" else [0]
    creator = b"win " if change == "creator" else b"tap\0"
    data = bytearray(vhd_images.image(9 * MIB, {0: {}}, full=full, creator=creator))
    place = {"sum": 2560, "cookie": 2048, "version": 2048 + 23}.get(change)
    if place is not None:
        data[place] ^= 8

    assert (batmap_of(bytes(data)) is not None) == (change == "none")


def test_a_batmap_whose_bytes_have_signs() -> None:
    """The checksum of version 1.1 sums the map's bytes as signed numbers."""
    data = bytearray(vhd_images.image(9 * MIB, {0: {}}, full=[0]))
    data[2048 + 20 : 2048 + 24] = b"\0\1\0\1"
    data[2048 + 24 : 2048 + 28] = (~-128 & 0xFFFFFFFF).to_bytes(4, "big")
    batmap = batmap_of(bytes(data))

    assert batmap is not None
    assert 1 == batmap.blocks[0]
    assert bytes(data[2048:2560]) == pack_batmap(batmap, batmap.blocks)[0]


def test_an_encrypted_disk_is_refused() -> None:
    """A disk that has the hash of a key is encrypted and is refused. Its guest would see noise."""
    data = bytearray(vhd_images.image(9 * MIB, full=[]))
    data[2048 + 29] = 1
    with pytest.raises(DriverError, match="is encrypted"):
        batmap_of(bytes(data))
