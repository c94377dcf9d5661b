"""The tables of a QCOW2 image: entries of L1, L2 and refcount tables, refcounts, snapshots, bitmaps, compression.

Source: QEMU, ``docs/interop/qcow2.txt``, "Host cluster management", "Cluster mapping", "Snapshots", "Bitmaps". A table
in memory is an `array` of 64-bit words in the host's order. Must not open a file, nor know where a table is cached.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import Protocol

from xenbackend.block.formats.common import Read, damaged
from xenbackend.block.formats.qcow2 import SUBCLUSTERS, Header, Region, check_region
from xenbackend.block.formats.words import pack, unpack
from xenbackend.units import round_up

COPIED = 1 << 63  # of an entry of L1 or L2: its refcount is exactly one, so it may be written in place
COMPRESSED = 1 << 62  # of an entry of L2
ZERO = 1  # of an entry of L2: reads as zeros
OFFSET = 0x00FF_FFFF_FFFF_FE00  # of an entry of L1 or L2
MAX_SNAPSHOT_TABLE = 64 << 20  # bytes, as in QEMU
MAX_BITMAPS = 65535  # as in QEMU
_MAX_BITMAP_TABLE = 256 << 20  # bytes; our choice: QEMU's limit, 2^29 entries of 8 bytes, is more than any image needs
_MAX_COMPRESSED_OFFSET = 1 << 56
_REFCOUNT_TABLE_OFFSET = ~0x1FF
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")
_WORDS = {3: "B", 4: "H", 5: "I", 6: "Q"}  # refcount order to type of array
_SPREAD = {  # for refcounts of less than a byte: from a byte to its refcounts, least significant bits first
    order: [
        bytes((byte >> shift) & ((1 << (1 << order)) - 1) for shift in range(0, 8, 1 << order)) for byte in range(256)
    ]
    for order in (0, 1, 2)
}


def unpack_table(data: bytes) -> array[int]:
    """Return the entries of a table of 64-bit words."""
    return unpack("Q", data, "big")


def pack_table(table: array[int]) -> bytes:
    """Return the bytes of a table, or of a slice of one."""
    return pack(table, "big")


def check_l1_entry(entry: int, header: Header) -> None:
    """Refuse an entry of an L1 table that has reserved bits, or not the place of a cluster. Raises: DriverError."""
    if entry & ~(OFFSET | COPIED) or (entry and not l1_place(entry, header)):
        raise damaged(f"an entry of its L1 table is {entry:#x}")


def check_l2_entry(entry: int, header: Header) -> None:
    """Refuse an entry of an L2 table that has reserved bits, or not the place of a cluster. Raises: DriverError."""
    allowed = ~COPIED if entry & COMPRESSED else OFFSET | COPIED | ZERO
    if entry & ~allowed:
        raise damaged(f"an entry of its L2 tables is {entry:#x}")
    l2_place(entry, header)


def l1_place(entry: int, header: Header) -> int:
    """Return where an L2 table is, 0 if there is none. Reserved bits are ignored, as by QEMU. Raises: DriverError."""
    place = entry & OFFSET
    if place & (header.cluster_size - 1):
        raise damaged(f"an entry of its L1 table is {entry:#x}")
    return place


def l2_place(entry: int, header: Header) -> int:
    """Return the place of the cluster, or of the compressed cluster, of an entry of an L2 table; 0 if there is none.

    As in QEMU, reserved bits are ignored, and so is the flag COPIED of an entry without a cluster.

    Raises: DriverError if no cluster can be there, and for zeros in an image of version 2, which does not have them.
    """
    if entry & COMPRESSED:
        place = compressed_place(entry, header.cluster_bits).offset
        is_wrong = place >= _MAX_COMPRESSED_OFFSET
    else:
        place = entry & OFFSET
        is_wrong = bool(place & (header.cluster_size - 1)) or (header.version == 2 and bool(entry & ZERO))
    if is_wrong:
        raise damaged(f"an entry of its L2 tables is {entry:#x}")
    return place


def check_bitmap(entry: int, bitmap: int, header: Header) -> None:
    """Refuse a bitmap of subclusters that contradicts its entry, or itself. Raises: DriverError."""
    data, zeros = bitmap & (1 << SUBCLUSTERS) - 1, bitmap >> SUBCLUSTERS
    has_place = entry & OFFSET or (header.has_data_file and entry & COPIED)
    if data & zeros or (data and not has_place) or (bitmap and entry & COMPRESSED):
        raise damaged(f"an entry of its L2 tables is {entry:#x}, and its bitmap {bitmap:#x}")


def compressed_place(entry: int, cluster_bits: int) -> Region:
    """Return the range that a compressed cluster may take: it ends somewhere in the last sector of that."""
    offset_bits = 62 - (cluster_bits - 8)
    offset = entry & ((1 << offset_bits) - 1)
    sectors = ((entry & ~(COPIED | COMPRESSED)) >> offset_bits) + 1
    return Region(offset, sectors * 512 - offset % 512)


class Unpack(Protocol):
    """Unpacks compressed clusters of an image."""

    def __call__(self, data: bytes, cluster_size: int) -> bytes:
        """Return a cluster from its compressed bytes and whatever follows them. Raises: DriverError."""


def inflate(data: bytes, cluster_size: int) -> bytes:
    """Return a cluster from its compressed bytes and whatever follows them. Raises: DriverError."""
    try:
        cluster = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)
    except zlib.error as error:
        raise damaged(f"a compressed cluster cannot be read: {error}") from error
    if len(cluster) != cluster_size:
        raise damaged(f"a compressed cluster gives {len(cluster)} bytes and not {cluster_size}")
    return cluster


def unpack_refcounts(block: bytes, order: int) -> array[int]:
    """Return the refcounts of a refcount block, each of 1 << `order` bits."""
    if order < 3:
        return array("B", b"".join(map(_SPREAD[order].__getitem__, block)))
    return unpack(_WORDS[order], block, "big")


def pack_refcounts(refcounts: array[int], order: int) -> bytes:
    """Return the bytes of refcounts, each of 1 << `order` bits; there must be enough to fill whole bytes.

    Raises: OverflowError if one of them is too large.
    """
    if refcounts and max(refcounts) >= 1 << (1 << order):
        raise OverflowError(f"a refcount of {max(refcounts)} does not fit into {1 << order} bits")
    if order >= 3:
        return pack(array(_WORDS[order], refcounts), "big")
    bits, each = 1 << order, 8 >> order
    return bytes(
        sum(refcount << (place * bits) for place, refcount in enumerate(refcounts[first : first + each]))
        for first in range(0, len(refcounts), each)
    )


def refcount_clusters(others: int, cluster_size: int, order: int) -> tuple[int, int]:
    """Return how many clusters a refcount table and its blocks take, if they count themselves and `others`."""
    table = blocks = 0
    while True:
        wanted = -(-((others + table + blocks) << order) // (cluster_size * 8))
        if wanted == blocks and table == -(-blocks * 8 // cluster_size):
            return table, blocks
        blocks = wanted
        table = -(-blocks * 8 // cluster_size)


def refcount_block_of(entry: int, header: Header) -> int:
    """Return the offset of the refcount block of an entry of the refcount table, 0 if there is none.

    Raises: DriverError.
    """
    if entry & ~_REFCOUNT_TABLE_OFFSET or entry & (header.cluster_size - 1):
        raise damaged(f"an entry of its refcount table is {entry:#x}")
    return entry


def has_more_clusters(read: Read, header: Header, clusters: int, limit: int) -> bool:
    """Return whether at least `limit` of the first `clusters` of the file are counted as used. Raises: DriverError."""
    region, order = header.refcount_table, header.refcount_order
    per_block = header.cluster_size * 8 >> order
    used = 0
    for entry in unpack_table(read(region.offset, region.length))[: -(-clusters // per_block)]:
        place = refcount_block_of(entry, header)
        if place:
            refcounts = unpack_refcounts(read(place, header.cluster_size), order)[:clusters]
            used += len(refcounts) - refcounts.count(0)
        clusters -= per_block
        if used >= limit:
            return True
    return False


def parse_snapshots(read: Read, header: Header, file_size: int) -> tuple[Region, list[Region]]:
    """Return where the snapshot table is, and the L1 tables of the snapshots. Raises: DriverError."""
    place, tables = header.snapshots_offset, []
    for _ in range(header.snapshot_count):
        fixed = read(place, _SNAPSHOT.size)
        if len(fixed) < _SNAPSHOT.size or place - header.snapshots_offset > MAX_SNAPSHOT_TABLE:
            raise damaged("its snapshot table does not end where it should")
        l1_offset, l1_entries, id_length, name_length, *_, extra_length = _SNAPSHOT.unpack(fixed)
        l1 = Region(l1_offset, l1_entries * 8)
        check_region("snapshot's L1 table", l1, file_size, header.cluster_size, file_size)
        tables.append(l1)
        place += round_up(_SNAPSHOT.size + extra_length + id_length + name_length, 8)
    if sum(each.length for each in tables) > file_size:
        raise damaged("the L1 tables of its snapshots are larger than the file")
    return Region(header.snapshots_offset, place - header.snapshots_offset), tables


def parse_bitmaps(read: Read, header: Header, file_size: int) -> Iterator[Region]:
    """Yield the regions of consistent bitmaps: their directory, their tables, their clusters.

    Raises: DriverError.
    """
    directory = header.bitmap_directory
    if directory is None:
        return
    check_region("bitmap directory", directory, MAX_SNAPSHOT_TABLE, header.cluster_size, file_size)
    yield directory
    data, place = read(directory.offset, directory.length), 0
    for _ in range(min(header.bitmap_count, MAX_BITMAPS)):
        if place + _BITMAP.size > len(data):
            raise damaged("its bitmap directory does not end where it should")
        offset, entries, _, _, _, name_length, extra_length = _BITMAP.unpack_from(data, place)
        place += round_up(_BITMAP.size + extra_length + name_length, 8)
        table = Region(offset, entries * 8)
        check_region("bitmap table", table, _MAX_BITMAP_TABLE, header.cluster_size, file_size)
        yield table
        for entry in unpack_table(read(table.offset, table.length)):
            if entry & OFFSET:
                yield Region(entry & OFFSET, header.cluster_size)
