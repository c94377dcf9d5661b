"""The header of QCOW, version 1."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzzing import endure
from tests.qcow_images import qcow, qcow2
from tests.qemu import qemu_img
from xenbackend.block.formats.qcow import Header, compressed_place, parse_header
from xenbackend.block.formats.qcow2 import Region
from xenbackend.block.formats.qcow2_tables import unpack_table
from xenbackend.block.qcow.codec import Version1
from xenbackend.errors import DriverError

SIZE = 1 << 20


def parse(data: bytes) -> Header:
    """Return what the header of a file says."""
    return parse_header(lambda offset, length: data[offset : offset + length], len(data))


def patched(offset: int, value: bytes) -> bytes:
    """Return an image with other bytes in its header."""
    data = bytearray(qcow(SIZE))
    data[offset : offset + len(value)] = value
    return bytes(data)


def test_an_image_of_qemu(tmp_path: Path) -> None:
    """The header that qemu-img wrote is read with the numbers and the parent's name that it was given."""
    (tmp_path / "base").write_bytes(bytes(SIZE))
    qemu_img("create", "-f", "qcow", "-b", "base", "-F", "raw", tmp_path / "image", "100M")
    header = parse((tmp_path / "image").read_bytes())

    assert (100 << 20, 9, 12, b"base") == (header.size, header.cluster_bits, header.l2_bits, header.backing_file)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "does not begin as one"),
        (qcow2(SIZE), "version 3 and not 1; write qcow2: for it"),
        (patched(32, b"\x08"), r"clusters have 2\^8 bytes"),
        (patched(32, b"\x11"), r"clusters have 2\^17 bytes"),
        (patched(33, b"\x05"), r"L2 tables 2\^5 entries"),
        (patched(36, b"\0\0\0\1"), "encrypted"),
        (patched(24, b"\0\0\0\0\0\x10\0\1"), "not a multiple of 512"),
        (patched(24, b"\x7f\0\0\0\0\0\0\0"), "need an L1 table of"),
        (patched(40, b"\0\0\0\0\0\0\0\0"), "L1 table of 8 bytes at byte 0"),
        (patched(40, b"\xff\0\0\0\0\0\0\0"), "not inside the file"),
        (patched(8, b"\0\0\0\0\0\0\0\x30\xff\0\0\0"), "name of its parent has 4278190080 bytes"),
    ],
)
def test_headers_that_are_refused(data: bytes, sentence: str) -> None:
    """Each impossible number is refused by a message that names it."""
    with pytest.raises(DriverError, match=sentence):
        parse(data)


def test_places_of_compressed_clusters() -> None:
    """In an entry, the length of a compressed cluster is in the bits above its offset."""
    assert Region(1000, 77) == compressed_place(1 << 63 | 77 << 51 | 1000, 12)


def look(data: bytes) -> None:
    """Read an image's header and tables as the driver does."""
    header = parse(data)
    assert header.l1.length <= len(data)
    codec = Version1(header)
    for word in unpack_table(data[header.l1.offset :][: header.l1.length // 8 * 8]):
        place, _ = codec.decode_l1(word)
        if place:
            table = data[place : place + (8 << header.l2_bits)].ljust(8 << header.l2_bits, b"\0")
            codec.decode_l2(unpack_table(table))


@pytest.mark.rows("D4", "D7", "R19")
def test_any_bytes_are_an_image_or_a_sentence(request: pytest.FixtureRequest) -> None:
    """R19: any bytes in headers and tables are accepted or raise DriverError, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    count = request.config.getoption("--requests") // 20
    good = qcow(64 << 10, {0: b"a" * 512, 100: b"b" * 512}, cluster_bits=9, compressed={3: bytes(512)}, backing=b"base")
    places = [*range(56), *[place for place, byte in enumerate(good) if byte and byte not in b"ab"]]

    def damaged() -> bytes:
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            data[chance.choice(places)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        return bytes(data[: chance.choice([len(data), len(data), chance.randrange(len(data))])])

    assert 0 < endure(count, damaged, look) < count
