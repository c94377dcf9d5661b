"""Tests of `xenbackend.block.formats.vhd`."""

from __future__ import annotations

import json
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random
from shutil import which

import pytest

from tests import vhd_images
from tests.fuzzing import endure
from xenbackend.block.formats import vhd, vhd_tables
from xenbackend.block.formats.vhd import Footer, Geometry, Header, Locator
from xenbackend.block.formats.vhd_names import parent_names
from xenbackend.errors import DriverError

MIB = 1 << 20
FOOTER = Footer(vhd.DYNAMIC, 40 * MIB, 40 * MIB, vhd.geometry_of(40 * MIB), bytes(range(16)), 512, timestamp=7)


def reader(data: bytes) -> vhd.Read:
    """Return a function that reads from bytes."""
    return lambda offset, length: data[offset : offset + length]


def look(data: bytes) -> tuple[Footer, Header | None]:
    """Read all of an image's headers and tables, as a driver does."""
    read = reader(data)
    footer, is_at_end = vhd.read_footer(read, len(data))
    if footer.type == vhd.FIXED:
        return footer, None
    header = vhd.read_header(read, footer, len(data))
    table = vhd_tables.read_table(read, footer, header)
    vhd_tables.read_batmap(read, footer, header, table)
    vhd_tables.check_table(table, header, [(0, 1536)], len(data) - 512 * is_at_end)
    parent_names(read, header, len(data))
    return footer, header


def test_a_footer_by_the_specification() -> None:
    """Each field is where the table "Hard Disk Footer Format" has it, and the checksum covers all other bytes."""
    data = vhd.pack_footer(FOOTER)

    assert (512, b"conectix", 2, 0x10000, 512, 7) == (len(data), data[:8], *struct.unpack_from(">IIQI", data, 8))
    assert (b"xenb", 0x10000, b"Wi2k", 40 * MIB, 40 * MIB) == struct.unpack_from(">4sI4sQQ", data, 28)
    assert (963, 5, 17, vhd.DYNAMIC) == struct.unpack_from(">HBBI", data, 56)
    assert ~(sum(data[:64]) + sum(data[68:])) & 0xFFFFFFFF == int.from_bytes(data[64:68], "big")
    assert (FOOTER.uuid, bytes(428)) == (data[68:84], data[84:])


def test_headers_come_back() -> None:
    """Headers with any values are read back as they were packed."""
    header = Header(
        1536, 20, 2 * MIB, b"p" * 16, 99, "base.vhd".encode("utf-16-be"), (Locator(b"W2ru", 512, 20, 4096),)
    )
    data = vhd.pack_footer(FOOTER) + vhd.pack_header(header) + b"\xff" * 512

    assert (FOOTER, False) == vhd.read_footer(reader(data), len(data))
    assert (FOOTER, True) == vhd.read_footer(reader(data + data[:512]), len(data) + 512)
    assert header == vhd.read_header(reader(data), FOOTER, len(data))


@pytest.mark.parametrize(
    ("size", "expected"),
    [  # by hand, from the specification's pseudo code
        (4 * MIB, (120, 4, 17)),
        (40 * MIB, (963, 5, 17)),
        (200 * MIB, (825, 16, 31)),
        (504 * MIB, (1024, 16, 63)),
        (1 << 30, (2080, 16, 63)),
        (100 << 30, (51400, 16, 255)),
        (2 << 40, (65535, 16, 255)),
    ],
)
def test_geometry(size: int, expected: tuple[int, int, int]) -> None:
    """Cylinders, heads and sectors are calculated as the specification says."""
    assert Geometry(*expected) == vhd.geometry_of(size)


@pytest.mark.skipif(not which("qemu-img"), reason="qemu-utils is not installed")
@pytest.mark.parametrize("size", [1 << 20, 3 << 20, 100 << 20, 504 << 20, 5 << 30, 130 << 30, 2000 << 30])
def test_sizes_as_qemu_has_them(tmp_path: Path, size: int) -> None:
    """A disk of QEMU's that was rounded to a geometry has the size that QEMU reports, and the geometry of ours."""
    path = tmp_path / "x.vhd"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vpc", str(path), str(size)], check=True)
    said = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True)
    footer, _ = vhd.read_footer(reader(path.read_bytes()), path.stat().st_size)

    assert b"qemu" == footer.creator
    assert json.loads(said.stdout)["virtual-size"] == footer.size >= size
    assert footer.geometry == vhd.geometry_of(footer.size)


def test_whose_size_is_the_geometrys() -> None:
    """Disks of Virtual PC and old QEMU end where their geometry ends. All others end where the footer says."""
    small = Geometry(100, 4, 17)
    sizes = {name: replace(FOOTER, creator=name, geometry=small).size for name in (b"vpc ", b"qemu", b"qem2", b"tap\0")}

    assert {b"vpc ": small.size, b"qemu": small.size, b"qem2": 40 * MIB, b"tap\0": 40 * MIB} == sizes
    largest = replace(FOOTER, creator=b"vpc ", geometry=Geometry(65535, 16, 255), current_size=2 << 40)
    assert 2 << 40 == largest.size


def test_the_end_is_believed_first() -> None:
    """A fixed disk's beginning belongs to the guest, so a footer that the guest writes there is ignored."""
    disk = bytearray(1 * MIB)
    evil = vhd_images.image(512 * MIB, parent_uuid=b"e" * 16, names=[(b"W2ku", "/etc/shadow".encode("utf-16-le"))])
    disk[: len(evil)] = evil
    footer, _ = look(vhd_images.fixed(bytes(disk)))

    assert (vhd.FIXED, MIB) == (footer.type, footer.size)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (0, b"connectx", "is not a VHD image"),
        (0, b"v_poison", "marked as unusable"),
        (12, b"\0\2\0\0", "version 0x20000"),
        (16, b"\0\0\0\0\0\0\x02\1", "header is at 513"),
        (16, b"\x7f" + bytes(7), "not inside the file"),
        (28, b"tap\0\0\0\0\1", "in reverse order"),
        (48, bytes(8), "disk has 0 bytes"),
        (48, b"\0\0\0\0\0\0\x02\1", "disk has 513 bytes"),
        (48, b"\0\0\2\0\0\0\x02\0", "disk has 2199023256064 bytes"),
        (60, b"\0\0\0\5", "is of type 5"),
        (512, b"cxspares", "there is no header at 512"),
        (512 + 24, b"\0\0\0\0", "version 0x0 and not 0x10000"),
        (512 + 32, b"\0\x20\0\1", "not a power of two"),
        (512 + 32, b"\0\0\x02\0", "blocks have 512 bytes"),
        (512 + 28, b"\0\0\0\x13", "table has 19 entries for 40 MiB"),
        (512 + 28, b"\xff\xff\xff\xff", "table has 4294967295 entries"),
        (512 + 16, b"\0\0\0\0\0\0\x06\1", "table is at 1537"),
        (512 + 16, b"\0\0\0\1\0\0\0\0", "not inside the file"),
    ],
)
def test_what_cannot_be_right_is_refused(place: int, value: bytes, sentence: str) -> None:
    """An impossible field is refused by a message that names it, even if the checksum is correct."""
    data = bytearray(vhd_images.image(40 * MIB))[:-512]
    data[place : place + len(value)] = value
    for start, length, sums in ((0, 512, 64), (512, 1024, 36)):
        part = bytes(data[start : start + length])
        data[start + sums : start + sums + 4] = vhd.checksum(part, sums).to_bytes(4, "big")
    with pytest.raises(DriverError, match=sentence):
        look(bytes(data))


@pytest.mark.parametrize(("place", "sentence"), [(40, "is not a VHD image"), (512 + 100, "checksum of its header")])
def test_checksums_are_looked_at(place: int, sentence: str) -> None:
    """A byte that was altered without the checksum is found."""
    data = bytearray(vhd_images.image(40 * MIB))[:-512]
    data[place] ^= 1
    with pytest.raises(DriverError, match=sentence):
        look(bytes(data))


@pytest.mark.rows("D1", "D2", "D3", "D4", "D5", "R19")
def test_any_bytes_are_an_image_or_a_sentence(request: pytest.FixtureRequest) -> None:
    """R19: any bytes in headers and tables are accepted or raise DriverError, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    count = request.config.getoption("--requests") // 20
    start = vhd_images.image(
        40 * MIB,
        {3: {1: b"x" * 512}},
        parent_uuid=b"p" * 16,
        names=[(b"W2ru", b".\0a\0"), (b"MacX", b"file://a")],
        full=[],
    )
    values = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\0\0\2\0", b"\x80\0\0\0"]

    def damaged() -> bytes:
        data = bytearray(start)
        for _ in range(chance.randint(1, 3)):
            place = chance.choice([chance.randrange(0, 1536), chance.randrange(1536, 4096)]) & ~3
            data[place : place + 4] = chance.choice([*values, chance.randbytes(4)])
        for at, length, sums in ((0, 512, 64), (512, 1024, 36)):
            part = bytes(data[at : at + length])
            data[at + sums : at + sums + 4] = vhd.checksum(part, sums).to_bytes(4, "big")
        return bytes(data[: chance.choice([len(data), len(data) - 512, chance.randrange(len(data))])])

    assert 0 < endure(count, damaged, look) < count
