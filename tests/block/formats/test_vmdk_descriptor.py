"""The text that names the files of a VMDK disk."""

from __future__ import annotations

from random import Random

import pytest

from tests.foreign_images import descriptor
from tests.fuzzing import endure
from xenbackend.block.formats.vmdk_descriptor import (
    COWD,
    FLAT,
    NO_PARENT,
    SPARSE,
    ZEROS,
    Descriptor,
    Extent,
    is_descriptor,
    parse,
)
from xenbackend.errors import DriverError


def test_what_it_says() -> None:
    """Extents are in the order of the disk. A flat one may begin anywhere in its file, one of ESX at its beginning."""
    text = descriptor(
        'RW 8 FLAT "a b-f001.vmdk" 16', 'RW 4 SPARSE "a-s002.vmdk"', "RW 2 ZERO", 'RDONLY 8 VMFS "a-flat.vmdk"',
        'RW 1 VMFSSPARSE "d"', cid=7, parent_cid=8, parent="b=c.vmdk", create_type="vmfs",
    )  # fmt: skip
    extents = (
        Extent(FLAT, 4096, b"a b-f001.vmdk", 8192),
        Extent(SPARSE, 2048, b"a-s002.vmdk", 0),
        Extent(ZEROS, 1024, b"", 0),
        Extent(FLAT, 4096, b"a-flat.vmdk", 0),
        Extent(COWD, 512, b"d", 0),
    )

    assert Descriptor(7, 8, b"b=c.vmdk", "vmfs", extents) == parse(text)
    assert 11776 == parse(text).size
    for extent in extents:
        extent.check()


def test_kinds_are_known_in_any_case() -> None:
    """The kind of an extent may be written in upper or lower case."""
    assert [FLAT, SPARSE] == [each.kind for each in parse(descriptor('RW 8 flat "a" 0', 'RW 8 Sparse "b"')).extents]


@pytest.mark.parametrize(
    "text",
    [
        b"# Disk DescriptorFile\n",
        b"# disk descriptorFile\r\nversion=1",
        b"\n# written by hand\n\r\n version = 3\n",
        b"\xef\xbb\xbf# Disk DescriptorFile\n"[3:],
    ],
)
def test_it_is_known_by_how_it_begins(text: bytes) -> None:
    """Comments and empty lines may come first, with any system's line ends."""
    assert is_descriptor(text.ljust(512, b"\n"))


@pytest.mark.parametrize("text", [b"", b"KDMV# Disk DescriptorFile", b"# a\n" * 200, b"x\nversion=1", bytes(512)])
def test_what_is_none(text: bytes) -> None:
    """Any other text is not a descriptor."""
    assert not is_descriptor(text)


def test_an_empty_one() -> None:
    """Missing values have their defaults, and text behind a NUL is ignored."""
    assert Descriptor(NO_PARENT, NO_PARENT, b"") == parse(b'\0RW 8 FLAT "a" 0\nCID=5')


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('RW 8 SESPARSE "a"', "'a' is of ESXi's format SE sparse; make one file of the disk with qemu-img convert"),
        ('RW 8 VMFSRDM "a"', "raw device mapping"),
        ('RW 8 VMFSRAW "a"', "device of an ESX host"),
        ('RW 8 NEW "a"', "of the kind NEW, which is not known"),
        ('NOACCESS 8 FLAT "a" 0', "marked NOACCESS"),
        ("RW 8 FLAT", "an extent of 4096 bytes has the name ''"),
        ('RW 0 FLAT "a" 0', "an extent of 0 bytes"),
        ('RW 8 ZERO "a"', "has the name 'a'"),
    ],
)
def test_extents_that_are_refused(line: str, sentence: str) -> None:
    """An unsupported extent is refused by its kind and name when it is to be opened, not when it is parsed."""
    (extent,) = parse(descriptor(line)).extents
    with pytest.raises(DriverError, match=sentence):
        extent.check()


def test_a_content_id_that_is_no_number() -> None:
    """A content ID that is not a number is refused."""
    with pytest.raises(DriverError, match="content ID in its descriptor is not a number"):
        parse(b"CID=zz")


@pytest.mark.slow
@pytest.mark.rows("D1", "D2", "D3", "D4", "D5", "R19")
def test_any_bytes_are_a_descriptor_or_a_sentence(request: pytest.FixtureRequest) -> None:
    """R19: any bytes in the text are accepted or raise DriverError, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    good = descriptor('RW 8 FLAT "a" 0', 'RW 8 SPARSE "b"', "RW 4 ZERO", parent="p") * 20

    def damaged() -> bytes:
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data))
            data[place : place + chance.choice([0, 1, 1, 9])] = chance.choice(
                [b"", b"\n", b'"', b"9" * 20, b" \t" * 50]
            )
        return bytes(data)

    def look(data: bytes) -> None:
        is_descriptor(data)
        for extent in parse(data).extents:
            extent.check()

    assert 0 < endure(request.config.getoption("--requests") // 20, damaged, look)
