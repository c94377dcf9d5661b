"""The header of QCOW2: headers of qemu-img are read, and unsupported ones are refused with what to do."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path
from random import Random

import pytest

from tests.fuzzing import endure
from tests.qcow_images import qcow, qcow2
from tests.qemu import qemu_img
from xenbackend.block.formats.qcow2 import (
    Header,
    Region,
    autoclear_bytes,
    incompatible_bytes,
    parse_header,
    refcount_table_bytes,
    with_parent,
)
from xenbackend.block.formats.qcow2_check import check
from xenbackend.block.formats.qcow2_tables import refcount_block_of, unpack_table
from xenbackend.block.mapped.tables import PLACE
from xenbackend.block.qcow.codec import Version2
from xenbackend.block.qcow.subclusters import entries_of
from xenbackend.errors import ConfigError, DriverError

SIZE = 1 << 20
_FIELDS = {  # offset in the header and size, in bytes
    "version": (4, 4), "backing_offset": (8, 8), "backing_length": (16, 4), "cluster_bits": (20, 4), "size": (24, 8),
    "crypt_method": (32, 4), "l1_entries": (36, 4), "l1_offset": (40, 8), "table_offset": (48, 8),
    "table_clusters": (56, 4), "snapshot_count": (60, 4), "snapshots_offset": (64, 8), "incompatible": (72, 8),
    "autoclear": (88, 8), "refcount_order": (96, 4), "header_length": (100, 4), "compression": (104, 1),
}  # fmt: skip


def parse(data: bytes) -> Header:
    """Return what the header of a file says."""
    return parse_header(lambda offset, length: data[offset : offset + length], len(data))


def patched(data: bytes, **values: int) -> bytes:
    """Return an image with other numbers in its header."""
    changed = bytearray(data)
    for name, value in values.items():
        offset, length = _FIELDS[name]
        changed[offset : offset + length] = value.to_bytes(length, "big")
    return bytes(changed)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("compat=1.1", (3, 16, 4, 0)),
        ("compat=0.10", (2, 16, 4, 0)),
        ("cluster_size=512,refcount_bits=1", (3, 9, 0, 0)),
        ("cluster_size=2M,refcount_bits=64", (3, 21, 6, 0)),
        ("lazy_refcounts=on", (3, 16, 4, 0)),
    ],
)
def test_images_of_qemu(tmp_path: Path, options: str, expected: tuple[int, ...]) -> None:
    """The header that qemu-img wrote is read with the numbers that it was given."""
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", "-o", options, path, "100M")
    header = parse(path.read_bytes())

    assert expected == (header.version, header.cluster_bits, header.refcount_order, header.incompatible)
    assert header.size == 100 << 20


def test_a_parent_of_qemu(tmp_path: Path) -> None:
    """The parent's name and format are those that qemu-img was given."""
    (tmp_path / "base").write_bytes(bytes(SIZE))
    qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "raw", tmp_path / "image")
    header = parse((tmp_path / "image").read_bytes())

    assert (b"base", "raw", SIZE) == (header.backing_file, header.backing_format, header.size)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"version": 1}, "version 1 and not 2 or 3; write qcow: for it"),
        ({"version": 4}, "version 4 and not 2 or 3"),
        ({"cluster_bits": 8}, r"clusters have 2\^8 bytes"),
        ({"cluster_bits": 22}, r"clusters have 2\^22 bytes"),
        ({"cluster_bits": 1 << 31}, "clusters have"),
        ({"crypt_method": 1}, "encrypted"),
        ({"crypt_method": 2}, "encrypted"),
        ({"size": SIZE + 1}, "not a multiple of 512"),
        ({"size": SIZE * 1000}, "L1 table has 1 entries, and its 1000 MiB need 500"),
        ({"l1_entries": 0}, "L1 table has 0 entries"),
        ({"l1_entries": 1 << 31}, "L1 table has 17179869184 bytes"),
        ({"l1_offset": 4095}, "L1 table of 8 bytes at byte 4095"),
        ({"l1_offset": 0}, "L1 table of 8 bytes at byte 0"),
        ({"l1_offset": 1 << 63}, "not inside the file"),
        ({"table_offset": 1 << 40}, "refcount table of 16384 bytes at byte 1099511627776"),
        ({"table_clusters": 0}, "refcount table has 0 bytes"),
        ({"table_clusters": (1 << 32) - 1}, "refcount table has 17592186040320 bytes"),
        ({"snapshot_count": 65537}, "65537 snapshots"),
        ({"snapshot_count": 1, "snapshots_offset": 7}, "1 snapshots at byte 7"),
        ({"refcount_order": 7}, r"refcounts have 2\^7 bits"),
        ({"header_length": 103}, "header has 103 bytes"),
        ({"header_length": 1 << 20}, "header has 1048576 bytes"),
        ({"incompatible": 1 << 3}, "compressed by method 0, which its features contradict"),
        ({"incompatible": 1 << 4}, "too few for subclusters"),
        ({"incompatible": 1 << 4, "cluster_bits": 13}, "too few for subclusters"),
        ({"autoclear": 1 << 1}, "marked as having a raw external data file, but also as having none"),
        ({"incompatible": 1 << 60}, "incompatible feature 'number 60'"),
        ({"backing_offset": 4000, "backing_length": 1024}, "name of its parent has 1024 bytes at byte 4000"),
        ({"backing_offset": 1 << 62, "backing_length": 4}, "name of its parent"),
    ],
)
def test_headers_that_are_refused(values: dict[str, int], sentence: str) -> None:
    """Each impossible number is refused by a message that names it, before the number is used."""
    with pytest.raises(DriverError, match=sentence):
        parse(patched(qcow2(SIZE), **values))


@pytest.mark.parametrize(
    ("incompatible", "kind", "sentence"),
    [(0, 1, "method 1, which its features"), (1 << 3, 2, "method 2, which is not supported")],
)
def test_kinds_of_compression_that_are_refused(incompatible: int, kind: int, sentence: str) -> None:
    """A compression method that is unknown, or that the features do not announce, is refused."""
    data = bytearray(patched(qcow2(SIZE, compression="zstd"), incompatible=incompatible))
    data[104] = kind
    with pytest.raises(DriverError, match=sentence):
        parse(bytes(data))


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_kinds_of_compression(compression: str) -> None:
    """The header says how clusters are compressed."""
    assert compression == parse(qcow2(SIZE, compression=compression)).compression


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "does not begin as one"),
        (bytes(1 << 16), "does not begin as one"),
        (qcow2(SIZE)[:71], "does not begin as one"),
        (qcow2(SIZE)[:90], "cut short"),
        (qcow2(SIZE)[:8192], "not inside the file"),
        (qcow(SIZE), "write qcow: for it"),
    ],
)
def test_files_that_are_no_image(data: bytes, sentence: str) -> None:
    """A file that is not a QCOW2 image, or only the beginning of one, is refused."""
    with pytest.raises(DriverError, match=sentence):
        parse(data)


def test_an_unknown_feature_has_its_name() -> None:
    """An unknown incompatible feature is named as the image's own table of features names it."""
    names = struct.pack(">IIBB46s", 0x6803F857, 48, 0, 40, b"quantum clusters")
    with pytest.raises(DriverError, match="'quantum clusters'"):
        parse(qcow2(SIZE, incompatible=1 << 40, extensions=names))


def test_extensions_that_are_too_long() -> None:
    """A header extension that claims to be longer than the room for it is refused."""
    with pytest.raises(DriverError, match="header extension 0x12345678 has 4096 bytes"):
        parse(qcow2(SIZE, extensions=struct.pack(">II", 0x12345678, 4096)))


def test_unknown_extensions_are_passed_over() -> None:
    """An unknown extension is skipped, and the one behind it is read."""
    header = parse(
        qcow2(SIZE, backing=b"base", backing_format=b"raw", extensions=struct.pack(">IIQ", 0x12345678, 5, 0))
    )

    assert (b"base", "raw") == (header.backing_file, header.backing_format)


def test_the_name_of_a_data_file() -> None:
    """The name of the external data file is read if the image has such a file and names it."""
    assert (b"data", True) == ((header := parse(qcow2(SIZE, data_name=b"data"))).data_name, header.has_data_file)
    assert (b"", True) == ((header := parse(qcow2(SIZE, data_name=b""))).data_name, header.has_data_file)
    assert b"" == parse(patched(qcow2(SIZE, data_name=b"data"), incompatible=0)).data_name


@pytest.mark.parametrize("name", [b"d" * 1024, b"da\0ta"])
def test_names_of_data_files_that_are_refused(name: bytes) -> None:
    """A data file's name is refused if it is too long for a file name or contains a NUL."""
    with pytest.raises(DriverError, match=f"name of its data file has {len(name)} bytes"):
        parse(qcow2(SIZE, data_name=name))


def test_bitmaps_count_where_they_are_consistent() -> None:
    """The directory of bitmaps is read only if the auto-clear feature says that it is valid."""
    extension = struct.pack(">IIIIQQ", 0x23852875, 24, 2, 0, 64, 8192)

    assert parse(qcow2(SIZE, extensions=extension)).bitmap_directory is None
    header = parse(qcow2(SIZE, extensions=extension, autoclear=1))
    assert (2, Region(8192, 64)) == (header.bitmap_count, header.bitmap_directory)


def test_what_may_change_is_written_where_it_is_read() -> None:
    """Feature bits and the refcount table's place are read back as they were written."""
    image = bytearray(qcow2(SIZE, incompatible=1, autoclear=1))
    table = Region(3 * 4096, 2 * 4096)
    for place, data in (incompatible_bytes(0), autoclear_bytes(4), refcount_table_bytes(table, 4096)):
        image[place : place + len(data)] = data
    header = parse(bytes(image))

    assert (0, 4, table) == (header.incompatible, header.autoclear, header.refcount_table)


def test_a_file_that_is_cut_meanwhile() -> None:
    """A file that has become shorter than its header after its size was determined is refused with a message."""
    data = qcow2(SIZE)
    with pytest.raises(DriverError, match="its header is cut short"):
        parse_header(lambda offset, length: data[offset : offset + length][:90], len(data))


def renamed(data: bytes, name: bytes, kind: str = "vpc") -> tuple[list[tuple[int, bytes]], list[bytes]]:
    """Return the writes that make another image the parent, and the image after each of them."""
    writes, images = with_parent(lambda offset, length: data[offset : offset + length], parse(data), name, kind), []
    for place, written in writes:
        data = data[:place] + written + data[place + len(written) :]
        images.append(data)
    return writes, images


UNKNOWN = struct.pack(">IIQ", 0x12345678, 5, 0)  # a header extension


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("former", "kind"), [(b"", ""), (b"base", "raw"), (b"", "k" * 40)])
@pytest.mark.parametrize("name", [b"x", b"n" * 1023])
def test_another_parent(version: int, former: bytes, kind: str, name: bytes) -> None:
    """The new name is written to free space, then one sector makes it the parent. Other extensions are kept."""
    data = qcow2(SIZE, version=version, backing=former, backing_format=kind.encode(), extensions=UNKNOWN)
    writes, (before, after) = renamed(data, name)
    header = parse(after)

    assert (former, kind) == (parse(before).backing_file, parse(before).backing_format)
    assert (name, "vpc") == (header.backing_file, header.backing_format)
    assert not any(data[writes[0][0] :][: len(name)])
    assert UNKNOWN in after[: header.cluster_size]
    assert len(writes[1][1]) <= 512
    assert parse(data).l1 == header.l1


def test_another_parent_where_there_is_little_room() -> None:
    """If a new name fits only where the former one is, it replaces that."""
    data = qcow2(64 << 10, cluster_bits=9, backing=b"b" * 340, backing_format=b"raw")
    header = parse(renamed(data, b"n" * 350)[1][-1])

    assert (b"n" * 350, "vpc") == (header.backing_file, header.backing_format)


@pytest.mark.parametrize(("cluster_bits", "length"), [(12, 1024), (9, 400), (9, 1023)])
def test_names_of_parents_that_do_not_fit(cluster_bits: int, length: int) -> None:
    """A name of more than 1023 bytes, or too long for the first cluster, is refused before anything is written."""
    data = qcow2(64 << 10, cluster_bits=cluster_bits, backing=b"base")
    with pytest.raises(ConfigError, match=f"the parent's name has {length} bytes, too many for the image's header"):
        renamed(data, b"n" * length)


@pytest.mark.parametrize("version", [2, 3])
def test_no_parent_any_more(version: int) -> None:
    """Without a name, an image has no parent and no parent's format. Other extensions are kept."""
    data = qcow2(SIZE, version=version, backing=b"base", backing_format=b"raw", extensions=UNKNOWN)
    _, (after,) = renamed(data, b"")

    assert (b"", "") == (parse(after).backing_file, parse(after).backing_format)
    assert UNKNOWN in after[: parse(after).cluster_size]


def look(data: bytes) -> None:
    """Read an image's header and tables as the driver does, and sometimes check all of it."""
    header = parse(data)
    assert header.l1.length <= 32 << 20
    assert header.refcount_table.length <= 8 << 20
    codec = Version2(header)

    def words(place: int, length: int) -> array[int]:
        return unpack_table(data[place : place + length].ljust(length, b"\0"))

    for word in words(header.refcount_table.offset, min(header.refcount_table.length, 4096)):
        refcount_block_of(word, header)
    for word in words(header.l1.offset, min(header.l1.length, 4096)):
        place, _ = codec.decode_l1(word)
        if place and header.has_subclusters:
            for entry in entries_of(words(place, 4096), header, 0):
                assert entry & PLACE < 1 << 57
        elif place:
            entries = codec.decode_l2(words(place, header.cluster_size))
            codec.check_table(0, entries)
            for entry in entries:
                assert entry & PLACE < 1 << 56
    if data[-1] & 15 == 0:
        check(lambda offset, length: data[offset : offset + length], len(data))


@pytest.mark.rows("D1", "D2", "D3", "D4", "D5", "R19")
def test_any_bytes_are_an_image_or_a_sentence(request: pytest.FixtureRequest) -> None:
    """R19: any bytes in headers and tables are accepted or raise DriverError, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    count = request.config.getoption("--requests") // 20
    good = qcow2(
        64 << 10, {0: b"a" * 512, 100: b"b" * 512}, cluster_bits=9, compressed={3: bytes(512)}, zeros=[7],
        backing=b"base", backing_format=b"raw", table_clusters=2, snapshot=True,
    )  # fmt: skip
    apart = qcow2(64 << 10, {0: b"", 100: b""}, cluster_bits=9, zeros=[7], data_name=b"data", autoclear=2)
    by_zstd = qcow2(64 << 10, {}, cluster_bits=9, compressed={3: bytes(512)}, compression="zstd")
    parts = qcow2(1 << 20, {0: b"a"}, cluster_bits=14, bitmaps={0: 5, 3: 7 << 40}, table_clusters=1)
    kinds = [
        (each, [place & ~7 for place, byte in enumerate(each) if byte and byte not in b"ab"])
        for each in (good, good, apart, by_zstd, parts)
    ]

    def damaged() -> bytes:
        whole, places = chance.choice(kinds)
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            if chance.random() < 0.4:
                offset, length = chance.choice(list(_FIELDS.values()))
            else:
                offset, length = chance.choice(places), chance.choice([1, 2, 8])
            value = chance.choice([0, 1, (1 << 8 * length) - 1, 1 << chance.randrange(8 * length)])
            value += chance.choice([-1, 0, 0, 1, 512, chance.randrange(256)])
            data[offset : offset + length] = (value % (1 << 8 * length)).to_bytes(length, "big")
        data[-1] = chance.randrange(256)
        return bytes(data)

    assert 0 < endure(count, damaged, look) < count
