"""Where an image has its tables, which no guest's data may overwrite, and its data: read by an independent reader.

Must not use our own code, so that it does not share its mistakes. Sources: QEMU's ``docs/interop/qcow2.txt`` and
``block/qcow.c``; "Virtual Hard Disk Image Format Specification"; blktap's ``include/vhd.h``. It believes what it reads:
a range may be anywhere. Numbers of things are bounded by what the images of tests have.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

OFFSET = 0x00FF_FFFF_FFFF_FE00
COMPRESSED, ZERO = 1 << 62, 1
UNUSED = 0xFFFF_FFFF
SECTOR = 512

Range = tuple[int, int]  # offset and end in the file, in bytes


@dataclass
class Places:
    """The layout of an image.

    Attributes:
        tables: everything that is not data: headers, tables, refcounts, bitmaps, footers, names.
        data: where the disk's clusters are in the file, by number; those that are there.
        cluster: bytes of one.
        frozen: tables that only a snapshot has: nobody may change a byte of them.
        uncounted: places of data that the image counts as free.
        snapshot: where the snapshot's clusters are.
        partial: clusters that lack sectors, by their own bitmap.
    """

    cluster: int
    tables: set[Range] = field(default_factory=set)
    data: dict[int, int] = field(default_factory=dict)
    frozen: set[Range] = field(default_factory=set)
    uncounted: set[int] = field(default_factory=set)
    snapshot: dict[int, int] = field(default_factory=dict)
    partial: set[int] = field(default_factory=set)

    def disk(self, file: bytes, size: int, *, of_snapshot: bool = False) -> bytearray:
        """Return what a disk holds; what the file does not have is zeros."""
        found = bytearray(size)
        for number, place in (self.snapshot if of_snapshot else self.data).items():
            start = number * self.cluster
            piece = file[place : place + min(self.cluster, max(0, size - start))]
            found[start : start + len(piece)] = piece
        return found


def _words(file: bytes, place: int, count: int) -> tuple[int, ...]:
    count = min(count, 4096)
    return struct.unpack(f">{count}Q", file[place : place + 8 * count].ljust(8 * count, b"\0"))


def qcow2(file: bytes) -> Places:
    """Read a QCOW2 image of either version."""
    _, version, _, _, bits, _, _, l1_count, l1, table, table_clusters, snapshots, snapshot_at = struct.unpack(
        ">4sIQIIQIIQQIIQ", file[:72]
    )
    order = int.from_bytes(file[96:100], "big") if version > 2 else 4
    assert (b"QFI\xfb", True) == (file[:4], bits < 22), "its header is no more"
    cluster = 1 << bits
    snapshots = min(snapshots, 16)
    found = Places(cluster)
    found.tables |= {(0, cluster), (l1, l1 + 8 * l1_count), (table, table + table_clusters * cluster)}
    blocks = _words(file, table, table_clusters * cluster // 8)
    found.tables |= {(block, block + cluster) for block in blocks if block}
    active = _level2(file, l1, l1_count, cluster, found.data)
    place = snapshot_at
    for _ in range(snapshots):
        its_l1, its_count, id_length, name_length = struct.unpack(">QIHH", file[place : place + 16])
        extra = int.from_bytes(file[place + 36 : place + 40], "big")
        end = place + 40 + extra + id_length + name_length
        frozen = _level2(file, its_l1, its_count, cluster, found.snapshot) - active
        frozen |= {(place, end), (its_l1, its_l1 + 8 * its_count)}
        found.frozen |= frozen
        place = -(-end // 8) * 8
    found.tables |= active | found.frozen
    for spot in {*found.data.values(), *found.snapshot.values()}:
        if not _refcount(file, blocks, spot >> bits, order, cluster):
            found.uncounted.add(spot)
    return found


def _level2(file: bytes, l1: int, count: int, cluster: int, data: dict[int, int]) -> set[Range]:
    """Add the places of data to `data`, and return the tables that name them."""
    tables, per_table = set(), cluster // 8
    for number, word in enumerate(_words(file, l1, count)):
        if not word & OFFSET:
            continue
        tables.add((word & OFFSET, (word & OFFSET) + cluster))
        for index, entry in enumerate(_words(file, word & OFFSET, per_table)):
            if entry & OFFSET and not entry & (COMPRESSED | ZERO):
                data[number * per_table + index] = entry & OFFSET
    return tables


def _refcount(file: bytes, blocks: tuple[int, ...], number: int, order: int, cluster: int) -> int:
    index, inside = divmod(number, cluster * 8 >> order)
    if index >= len(blocks) or not blocks[index]:
        return 0
    bit = blocks[index] * 8 + (inside << order)
    if order >= 3:
        return int.from_bytes(file[bit >> 3 : (bit >> 3) + (1 << order - 3)], "big")
    return file[bit >> 3] >> (bit & 7) & (1 << (1 << order)) - 1 if bit >> 3 < len(file) else 0


def qcow(file: bytes) -> Places:
    """Read a QCOW image of version 1."""
    size, bits, l2_bits, _, _, l1 = struct.unpack(">QBBHIQ", file[24:48])
    count = -(-size >> bits + l2_bits)
    found = Places(1 << bits, {(0, 48), (l1, l1 + 8 * count)})
    for number, place in enumerate(_words(file, l1, count)):
        if not place:
            continue
        found.tables.add((place, place + (8 << l2_bits)))
        for index, entry in enumerate(_words(file, place, 1 << l2_bits)):
            if entry and not entry >> 63:
                found.data[(number << l2_bits) + index] = entry
                if entry + found.cluster > len(file):
                    found.uncounted.add(entry)  # the next cluster goes there
    return found


def vhd(file: bytes) -> Places:
    """Read a dynamic VHD image; by the footer at its end, or else by the copy at its beginning."""
    end = len(file) - SECTOR
    footer = file[end:] if file[end : end + 8] == b"conectix" else file[:SECTOR]
    header = int.from_bytes(footer[16:24], "big")
    (size,) = struct.unpack(">Q", footer[48:56])
    table, _, entries, block = struct.unpack(">QIII", file[header + 16 : header + 36])
    bitmap = -(-block // SECTOR // 8 // SECTOR) * SECTOR
    found = Places(block, {(0, SECTOR), (header, header + 1024), (table, table + -(-4 * entries // SECTOR) * SECTOR)})
    if footer is not file[:SECTOR]:
        found.tables.add((end, end + SECTOR))
    for each in range(8):
        code, space, _, _, offset = struct.unpack(">4sIIIQ", file[header + 576 + 24 * each :][:24])
        if any(code):
            found.tables.add((offset, offset + (space * SECTOR if space < SECTOR else space)))
    count = -(-size // block)
    for number, sector in enumerate(struct.unpack(f">{count}I", file[table : table + 4 * count].ljust(4 * count))):
        if sector != UNUSED:
            place = sector * SECTOR
            found.tables.add((place, place + bitmap))
            found.data[number] = place + bitmap
            if file[place : place + block // SECTOR // 8].strip(b"\xff"):
                found.partial.add(number)
    map_at = table + -(-4 * entries // SECTOR) * SECTOR
    if file[map_at : map_at + 8] == b"tdbatmap":
        offset, sectors = struct.unpack(">QI", file[map_at + 8 : map_at + 20])
        end = offset + sectors * SECTOR
        if not any(offset < place + block and place - bitmap < end for place in found.data.values()):
            found.tables |= {(map_at, map_at + SECTOR), (offset, end)}  # a map over a block is none
    return found
