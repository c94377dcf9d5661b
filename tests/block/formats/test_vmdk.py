"""The header, the descriptor and the tables of VMDK."""

from __future__ import annotations

import struct
import zlib

import pytest

from tests.foreign_images import GRAIN, MIB, cowd, vmdk
from xenbackend.block.formats.vmdk import Image, parse, parse_cowd
from xenbackend.block.formats.vmdk_descriptor import Descriptor, Extent
from xenbackend.block.mapped.tables import PLACE, READABLE, SPECIAL, ZERO
from xenbackend.errors import DriverError

SIZE = 4 * MIB
DATA = b"x" * GRAIN


def parsed(data: bytes) -> Image:
    """Return what a file says."""
    return parse(lambda offset, length: data[offset : offset + length], len(data))


def patched(offset: int, value: bytes) -> bytes:
    """Return an image with other bytes in it."""
    data = bytearray(vmdk(SIZE, {}))
    data[offset : offset + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("compressed", "flag"), [(False, READABLE), (True, SPECIAL)])
def test_a_table(compressed: bool, flag: int, at_end: bool) -> None:
    """Grains are in the file, in the parent, or zeros. The directory's offset may be in the footer of the file."""
    data = vmdk(SIZE, {1: DATA, 2: None}, compressed=compressed, at_end=at_end)
    image = parsed(data)
    place, length = image.table_at(0)

    assert [0, GRAIN | flag, ZERO, 0] == list(image.decode(data[place : place + length]))[:4]


def test_a_table_that_is_not_there() -> None:
    """A directory entry of 0 means that there is no table."""
    assert (0, 0) == parsed(patched(21 * 512, bytes(4))).table_at(0)


def test_the_descriptor() -> None:
    """Names and content IDs are those of the descriptor."""
    image = parsed(vmdk(SIZE, {}, cid=7, parent_cid=8, parent="a=b.vmdk"))

    assert Descriptor(7, 8, b"a=b.vmdk", "", (Extent("SPARSE", 512, b"image", 0),)) == image.descriptor


def test_an_extent_of_a_disk_in_several_files() -> None:
    """A file that another file's descriptor names needs no descriptor of its own."""
    data = patched(28, bytes(8))

    assert SIZE == parse(lambda offset, length: data[offset : offset + length], len(data), is_part=True).shape.size


def test_an_extent_of_esx() -> None:
    """A COWD extent has tables of 4096 grains, which may be as small as a sector."""
    data = cowd(3 * MIB, {1: b"x" * 512, 5000: b"y" * 512})
    image = parse_cowd(lambda offset, length: data[offset : offset + length], len(data))
    places = []
    for number in range(image.shape.tables):
        place, length = image.table_at(number)
        places += [each & PLACE for each in image.decode(data[place : place + length])]

    assert (3 * MIB, 9, 12, 2) == (
        image.shape.size,
        image.shape.cluster_bits,
        image.shape.table_bits,
        len(places) >> 12,
    )
    assert {1: b"x", 5000: b"y"} == {number: data[place : place + 1] for number, place in enumerate(places) if place}


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (0, b"KDMV", "does not begin as one"),
        (16, b"\3", "grains have 3 sectors"),
        (20, b"\xff\xff", "not inside the file"),
        (12, b"\xff\xff\xff\xff", "not inside the file"),
        (2048, b"\xff\xff", "a table is at byte"),
    ],
)
def test_extents_of_esx_that_are_refused(place: int, value: bytes, sentence: str) -> None:
    """Each impossible number is refused by a message that names it."""
    data = bytearray(cowd(3 * MIB, {}))
    data[place : place + len(value)] = value
    with pytest.raises(DriverError, match=sentence):
        parse_cowd(lambda offset, length: bytes(data[offset : offset + length]), len(data))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "does not begin as one"),
        (b"COWD".ljust(512), "a part of a disk, of ESX's format COWD; open the descriptor"),
        (vmdk(SIZE, {}, extents=""), "its descriptor names no extent"),
        (vmdk(SIZE, {}, extents='RW 1 SPARSE "a"\nRW 1 SPARSE "b"'), "one of 2 parts of a disk"),
        (vmdk(SIZE, {}, extents='RW 1 FLAT "/etc/shadow" 0'), "one of 1 parts of a disk"),
        (patched(28, bytes(8)), "a part of a disk in several files"),
        (patched(20, b"\x81"), "grains have 129 sectors"),
        (patched(44, b"\1"), "tables 513 of them"),
        (patched(73, b"\r\n"), "transfer in text mode"),
        (patched(10, b"\1"), "compressed by method 0"),
        (patched(17, b"\xff\xff\xff"), "need a directory of"),
        (patched(56, b"\xff\xff"), "not inside the file"),
        (patched(21 * 512, b"\xff\xff"), "a table is at byte"),
        (patched(534, b"CID=zz;;"), "content ID in its descriptor is not a number"),
        (vmdk(SIZE, {}, at_end=True)[:-1024], "does not begin as one"),
    ],
)
def test_headers_that_are_refused(data: bytes, sentence: str) -> None:
    """Each impossible number is refused by a message that names it. So is a file that is only a part of a disk."""
    with pytest.raises(DriverError, match=sentence):
        parsed(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is that of sector -1"),
        (struct.pack("<QI", 0, 3) + b"abc", "is that of sector 0"),
        (struct.pack("<QI", 128, 3) + b"abc", "cannot be read"),
        (struct.pack("<QI", 128, 100) + zlib.compress(b"abc"), "gives 3 bytes"),
    ],
)
def test_grains_that_are_damaged(data: bytes, sentence: str) -> None:
    """A grain that belongs to another sector, or does not inflate to its length, is refused."""
    with pytest.raises(DriverError, match=sentence):
        parsed(vmdk(SIZE, {})).inflate(128, data)


def test_a_grain_that_would_inflate_to_gigabytes() -> None:
    """A compressed grain is inflated to the length of a grain at most."""
    packed = zlib.compress(bytes(64 * MIB))

    assert bytes(GRAIN) == parsed(vmdk(SIZE, {})).inflate(0, struct.pack("<QI", 0, len(packed)) + packed)


def test_the_last_grain() -> None:
    """The last grain of a disk may be shorter than the others."""
    packed = zlib.compress(b"y" * 512)
    image = parsed(vmdk(GRAIN + 512, {}))

    assert (b"y" * 512).ljust(GRAIN, b"\0") == image.inflate(128, struct.pack("<QI", 128, len(packed)) + packed)
