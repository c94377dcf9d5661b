"""Partition tables as a test wants them, damaged ones too, which sfdisk would not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from uuid import UUID

LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
Entries = Mapping[int, tuple[int, int, int]]  # by place from 1 on: type, first sector, sectors


def record(entries: Entries) -> bytes:
    """Return a boot record of 512 bytes."""
    table = bytearray(64)
    for place, (kind, start, count) in entries.items():
        struct.pack_into("<BxxxBxxxII", table, (place - 1) * 16, 0, kind, start, count)
    return bytes(446) + bytes(table) + b"\x55\xaa"


def mbr(size: int, entries: Entries, records: Mapping[int, Entries] | None = None) -> bytearray:
    """Return a disk of `size` bytes with an MBR, and extended records by their sector."""
    disk = bytearray(size)
    for sector, each in {0: entries, **(records or {})}.items():
        disk[sector * 512 : sector * 512 + 512] = record(each)
    return disk


def gpt(size: int, partitions: Mapping[int, tuple[int, int]], sector: int = 512) -> bytearray:
    """Return a disk of `size` bytes with a GPT: first and last sector of each partition."""
    disk = bytearray(size)
    last, array = size // sector - 1, -(-128 * 128 // sector)
    entries = bytearray(128 * 128)
    for place, (start, end) in partitions.items():
        struct.pack_into("<16s16sQQ", entries, (place - 1) * 128, LINUX.bytes_le, bytes([place] * 16), start, end)
    disk[:512] = record({1: (0xEE, 1, min(last, 0xFFFFFFFF))})
    for mine, other, where in ((1, last, 2), (last, 1, last - array)):
        disk[where * sector : where * sector + len(entries)] = entries
        write_header(disk, sector, mine, other, where, array + 2, last - array - 1)
    return disk


def write_header(disk: bytearray, sector: int, mine: int, other: int, array: int, first: int, usable: int) -> None:
    """Write a header whose checksums are right."""
    entries = zlib.crc32(disk[array * sector : array * sector + 128 * 128])
    values = [b"EFI PART", 0x10000, 92, 0, 0, mine, other, first, usable, bytes(16), array, 128, 128, entries]
    form = "<8sIIIIQQQQ16sQIII"
    values[3] = zlib.crc32(struct.pack(form, *values))
    struct.pack_into(form, disk, mine * sector, *values)
