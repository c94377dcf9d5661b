"""The tables of QCOW2: words and refcounts as the format's specification has them, and compressed clusters."""

from __future__ import annotations

import struct
from array import array
from dataclasses import replace

import pytest

from tests.qcow_images import deflate, qcow2
from xenbackend.block.formats.qcow2 import Header, Region, parse_header
from xenbackend.block.formats.qcow2_tables import (
    COMPRESSED,
    COPIED,
    ZERO,
    check_l1_entry,
    check_l2_entry,
    compressed_place,
    has_more_clusters,
    inflate,
    pack_refcounts,
    pack_table,
    parse_bitmaps,
    parse_snapshots,
    refcount_block_of,
    unpack_refcounts,
    unpack_table,
)
from xenbackend.errors import DriverError

SIZE = 1 << 20


def header_of(data: bytes) -> Header:
    """Return the header of an image."""
    return parse_header(lambda offset, length: data[offset : offset + length], len(data))


HEADER = header_of(qcow2(SIZE))
HEADER_V2 = header_of(qcow2(SIZE, version=2))


def test_tables_are_big_endian() -> None:
    """The words of a table are big-endian."""
    assert [1, 1 << 63] == list(unpack_table(b"\0\0\0\0\0\0\0\1\x80\0\0\0\0\0\0\0"))
    assert b"\0\0\0\0\0\0\1\2" == pack_table(array("Q", [258]))


@pytest.mark.parametrize(
    ("order", "refcounts", "data"),
    [
        (0, [1, 0, 0, 0, 0, 0, 0, 1], b"\x81"),
        (1, [1, 2, 3, 0], b"\x39"),
        (2, [1, 15], b"\xf1"),
        (3, [255], b"\xff"),
        (4, [258], b"\1\2"),
        (5, [1], b"\0\0\0\1"),
        (6, [1 << 63], b"\x80\0\0\0\0\0\0\0"),
    ],
)
def test_refcounts(order: int, refcounts: list[int], data: bytes) -> None:
    """Refcounts of every width are read. If they have less than a byte, the first is in the lowest bits."""
    assert data == pack_refcounts(array("Q", refcounts), order)
    assert refcounts == list(unpack_refcounts(data, order))


@pytest.mark.parametrize("order", range(6))
def test_refcounts_that_are_too_large(order: int) -> None:
    """A refcount that does not fit is refused, not truncated."""
    with pytest.raises(OverflowError):
        pack_refcounts(array("Q", [0] * 7 + [1 << (1 << order)]), order)


@pytest.mark.parametrize("entry", [0, 4096, 4096 | COPIED, (1 << 56) - 4096])
def test_good_l1_entries(entry: int) -> None:
    """An L1 entry is the offset of a table, with or without the COPIED flag."""
    check_l1_entry(entry, HEADER)


@pytest.mark.parametrize("entry", [1, 512, 4096 | 1 << 56, COMPRESSED | 4096, COPIED])
def test_bad_l1_entries(entry: int) -> None:
    """Reserved bits, or an offset that is not a cluster's, are refused."""
    with pytest.raises(DriverError, match="L1 table is"):
        check_l1_entry(entry, HEADER)


@pytest.mark.parametrize("entry", [0, 4096, 4096 | COPIED, COPIED, ZERO, 4096 | ZERO | COPIED, COMPRESSED | 5])
def test_good_l2_entries(entry: int) -> None:
    """An L2 entry is a cluster, zeros with or without a cluster, or a compressed cluster."""
    check_l2_entry(entry, HEADER)


@pytest.mark.parametrize("entry", [2, 512, 4096 | 1 << 56, COMPRESSED | COPIED | 5, COMPRESSED | 1 << 56])
def test_bad_l2_entries(entry: int) -> None:
    """Reserved bits, an offset that is not a cluster's, and flags that contradict each other are refused."""
    with pytest.raises(DriverError, match="L2 tables"):
        check_l2_entry(entry, HEADER)


def test_no_zeros_in_version_2() -> None:
    """In version 2, the bit for zeros is reserved."""
    with pytest.raises(DriverError, match="L2 tables"):
        check_l2_entry(ZERO, HEADER_V2)


@pytest.mark.parametrize(
    ("cluster_bits", "entry", "region"),
    [
        (16, COMPRESSED | 3 << 54 | 1000, Region(1000, 4 * 512 - 1000 % 512)),
        (9, COMPRESSED | 1 << 61 | 512, Region(512, 1024)),
        (21, COMPRESSED | 1, Region(1, 511)),
    ],
)
def test_places_of_compressed_clusters(cluster_bits: int, entry: int, region: Region) -> None:
    """Where an entry's sector count begins depends on the cluster size. The region ends with a sector."""
    assert region == compressed_place(entry, cluster_bits)


def test_inflate() -> None:
    """A compressed cluster is inflated whatever follows it. One that is cut short or damaged is refused."""
    cluster = bytes(range(256)) * 16
    packed = deflate(cluster)

    assert cluster == inflate(packed + b"rest", 4096)
    for wrong in (packed[:-4], b"\xff" * 512, deflate(cluster[:100])):
        with pytest.raises(DriverError, match="compressed cluster"):
            inflate(wrong, 4096)


def test_a_bomb_inflates_to_a_cluster() -> None:
    """Compressed bytes that would inflate to a thousand clusters give only one."""
    assert bytes(4096) == inflate(deflate(bytes(4 << 20)), 4096)


@pytest.mark.parametrize("entry", [1, 511, 512, 1 << 63 | 2048])
def test_bad_refcount_table_entries(entry: int) -> None:
    """A refcount table entry must be the offset of a cluster."""
    with pytest.raises(DriverError, match="refcount table"):
        refcount_block_of(entry, HEADER)


def test_snapshots() -> None:
    """The snapshot table is found with its L1 tables. A table that does not end is refused."""
    data = qcow2(SIZE, {0: b"x" * 4096}, snapshot=True)
    header = header_of(data)
    region, tables = parse_snapshots(lambda offset, length: data[offset : offset + length], header, len(data))

    assert (header.snapshots_offset, 64) == (region.offset, region.length)
    assert [8] == [each.length for each in tables]
    with pytest.raises(DriverError, match="does not end"):
        parse_snapshots(lambda _offset, _length: b"", header, len(data))


def test_snapshots_larger_than_the_file() -> None:
    """L1 tables of snapshots may overlap, but together they must not be larger than the file."""
    data = bytearray(qcow2(SIZE, {0: b"x" * 4096}, snapshot=True))
    header = header_of(bytes(data))
    length = len(data) - 4096
    each = struct.pack(">QIHHIIQII", 4096, length // 8, 0, 0, 0, 0, 0, 0, 0)
    data[header.snapshots_offset : header.snapshots_offset + 2 * len(each)] = each * 2

    def parsed(count: int) -> list[Region]:
        several = replace(header, snapshot_count=count)
        return parse_snapshots(lambda offset, length: bytes(data[offset : offset + length]), several, len(data))[1]

    assert [Region(4096, length)] == parsed(1)
    with pytest.raises(DriverError, match="the L1 tables of its snapshots are larger than the file"):
        parsed(2)


def test_clusters_in_use_are_counted_as_far_as_needed() -> None:
    """Clusters in use are counted in the existing refcount blocks up to the limit, and no block is read needlessly."""
    data = bytearray(qcow2(128 << 9, dict.fromkeys(range(100), b"x"), cluster_bits=9, order=6, table_clusters=1))
    header, used, reads = header_of(bytes(data)), len(data) // 512, []
    assert 64 < used < 128, "two blocks"

    def has(limit: int, clusters: int = used) -> bool:
        def read(offset: int, length: int) -> bytes:
            reads.append(offset)
            return bytes(data[offset : offset + length])

        reads.clear()
        return has_more_clusters(read, header, clusters, limit)

    assert (True, False) == (has(used), has(used + 1))
    assert (True, False) == (has(70, 70), has(71, 70))
    assert has(64)
    assert 2 == len(reads), "the table and one block"
    data[header.refcount_table.offset : header.refcount_table.offset + 8] = bytes(8)
    assert (True, False) == (has(used - 64), has(used - 64 + 1))
    assert 2 == len(reads), "the table and one block"


def test_a_directory_of_bitmaps_that_is_cut_short() -> None:
    """A directory with fewer entries than bitmaps is refused after the entries that it has."""
    data = bytearray(qcow2(SIZE, extensions=struct.pack(">IIIIQQ", 0x23852875, 24, 2, 0, 32, 2 * 4096), autoclear=1))
    data[2 * 4096 : 2 * 4096 + 28] = struct.pack(">QIIBBHI", 3 * 4096, 1, 0, 1, 16, 4, 0) + b"name"
    regions = parse_bitmaps(
        lambda offset, length: bytes(data[offset : offset + length]), header_of(bytes(data)), len(data)
    )

    assert [Region(2 * 4096, 32), Region(3 * 4096, 8)] == [next(regions), next(regions)]
    with pytest.raises(DriverError, match="its bitmap directory does not end where it should"):
        next(regions)


def test_bitmaps() -> None:
    """The regions of bitmaps are the directory, each table, and each cluster that a table names."""
    directory = struct.pack(">QIIBBHI", 3 * 4096, 2, 0, 1, 16, 4, 0) + b"name"
    data = bytearray(qcow2(SIZE, extensions=struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, 32, 2 * 4096), autoclear=1))
    data[2 * 4096 : 2 * 4096 + 28] = directory
    data[3 * 4096 : 3 * 4096 + 16] = struct.pack(">QQ", 4 * 4096, 1)
    header = header_of(bytes(data))
    regions = list(parse_bitmaps(lambda offset, length: bytes(data[offset : offset + length]), header, len(data)))

    assert [Region(2 * 4096, 32), Region(3 * 4096, 16), Region(4 * 4096, 4096)] == regions
