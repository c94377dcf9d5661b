"""The tables of a VHD image, for the places of blocks and the sectors that they have: bytes to values and back.

Sources: "Virtual Hard Disk Image Format Specification", version 1.0, "Block Allocation Table and Data Blocks"; for the
batmap blktap's ``include/vhd.h`` and ``vhd/lib/libvhd.c``. All numbers are big-endian. Must not open a file, nor trust
a table that it has not checked.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from xenbackend.block.formats.common import Read
from xenbackend.block.formats.vhd import Footer, Header, damaged
from xenbackend.block.formats.words import unpack
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR, round_up

UNUSED = 0xFFFFFFFF  # the table's entry for a block that the image does not have
BATMAP = struct.Struct(">8sQIII1sB")  # the rest of its sector is zeros, or a key's hash

_VERSION_AND_SUM, _VERSION_AT = struct.Struct(">II"), 20
_BATMAP_COOKIE = b"tdbatmap"
_SIGNED_SUMS, _LATEST = 0x00010001, 0x00010002  # versions of the batmap; 1.1 summed its bytes as signed numbers
_BITS = [bytes(value >> 7 - bit & 1 for bit in range(8)) for value in range(256)]
_STRETCH = 512  # entries that are skipped together
_ALL_UNUSED = array("I", [UNUSED] * _STRETCH).tobytes()
_DIGITS = bytes.maketrans(b"\0\1", b"01")


@dataclass(frozen=True, slots=True)
class Batmap:
    """libvhd's map of the blocks that have all their sectors: one bit for each block. Offsets, sizes: bytes."""

    header_offset: int
    header: bytes  # its sector as it is
    offset: int
    size: int
    blocks: bytes  # one byte for each block: 1 if it is full


def read_table(read: Read, footer: Footer, header: Header) -> array[int]:
    """Return the first sector of each block of the disk, or UNUSED. Raises: DriverError."""
    count = -(-footer.size // header.block_size)
    table = unpack("I", read(header.table_offset, 4 * count), "big")
    if len(table) < count:
        raise damaged("the file ends inside its table")
    return table


def used_blocks(table: array[int]) -> Iterator[int]:
    """Yield the blocks that the image has; skips unused stretches, since a look at each entry of 2 TiB takes 0.1 s."""
    data, width = table.tobytes(), table.itemsize
    for start in range(0, len(table), _STRETCH):
        if data[start * width : (start + _STRETCH) * width] != _ALL_UNUSED:
            stretch = enumerate(table[start : start + _STRETCH], start)
            yield from (block for block, sector in stretch if sector != UNUSED)


def pack_entries(entries: Sequence[int]) -> bytes:
    """Return the bytes of entries of the table."""
    return struct.pack(f">{len(entries)}I", *entries)


def check_table(table: array[int], header: Header, metadata: Sequence[tuple[int, int]], end: int) -> int:
    """Check a table, and return where the last block ends, or 0.

    `metadata` are ranges, as (start, end), that no block may overlap. A block may end beyond `end`, as left by a writer
    that was killed, but not begin there.

    Raises: DriverError if its blocks overlap or the metadata, or are outside the file.
    """
    stride = header.bitmap_size + header.block_size
    used = sorted(table[block] for block in used_blocks(table))
    if (len(used) - 1) * stride > end:
        raise damaged("its table has more blocks than fit into the file")
    if any(after - before < stride // SECTOR for before, after in pairwise(used)):
        raise damaged("its blocks overlap")
    if used and used[-1] * SECTOR >= end:
        raise damaged(f"a block begins at {used[-1] * SECTOR}, beyond the end of the file")
    for start, stop in metadata:
        if _touches(used, stride, start, stop):
            raise damaged(f"a block overlaps what the image keeps at {start}")
    return used[-1] * SECTOR + stride if used else 0


def unpack_bitmap(data: bytes | memoryview, sectors: int) -> bytearray:
    """Return one byte for each sector of a block: 1 if the block has it."""
    return bytearray(b"".join(map(_BITS.__getitem__, data))[:sectors])


def pack_bitmap(sectors: bytes | bytearray, size: int) -> bytes:
    """Return the bitmap of a block, `size` bytes long."""
    digits = bytes(sectors).translate(_DIGITS).ljust(8 * size, b"0")
    return int(digits, 2).to_bytes(size, "big")


def read_batmap(read: Read, footer: Footer, header: Header, table: array[int]) -> Batmap | None:
    """Return the batmap, or None if there is none that can be trusted.

    It is only a short cut, so one with a wrong checksum, or with blocks that the table does not have, is ignored.

    Raises: DriverError if it says that the disk is encrypted.
    """
    if not _may_have_batmap(footer):
        return None
    place = _batmap_place(header)
    data = read(place, SECTOR)
    if len(data) < SECTOR or data[:8] != _BATMAP_COOKIE:
        return None
    _, offset, sectors, version, total, _, has_key = BATMAP.unpack_from(data)
    if has_key:
        raise DriverError("it is encrypted, which is not supported")
    size = max(SECTOR, round_up(footer.current_size >> 24, SECTOR))  # as libvhd: 8 blocks of 2 MiB for each byte
    if version > _LATEST or sectors * SECTOR < size or offset % SECTOR:
        return None
    bits = read(offset, size)
    if len(bits) < size or _batmap_sum(bits, version) != total:
        return None
    blocks = bytes(unpack_bitmap(bits, len(table))).ljust(len(table), b"\0")
    if any(full and entry == UNUSED for full, entry in zip(blocks, table, strict=True)):
        return None
    return Batmap(place, data, offset, size, blocks)


def batmap_ranges(read: Read, footer: Footer, header: Header) -> list[tuple[int, int]]:
    """Return the ranges that a batmap claims, as (start, end), also of one that cannot be trusted."""
    place = _batmap_place(header)
    data = read(place, SECTOR)
    if not _may_have_batmap(footer) or len(data) < SECTOR or data[:8] != _BATMAP_COOKIE:
        return []
    _, offset, sectors, *_ = BATMAP.unpack_from(data)
    return [(place, place + SECTOR), (offset, offset + sectors * SECTOR)]


def pack_batmap(batmap: Batmap, blocks: bytes) -> tuple[bytes, bytes]:
    """Return the new bytes of a batmap's header and map; `blocks` has one byte for each block."""
    bits = pack_bitmap(blocks[: 8 * batmap.size], batmap.size)
    version, _ = _VERSION_AND_SUM.unpack_from(batmap.header, _VERSION_AT)
    total = _batmap_sum(bits, version)
    after = _VERSION_AT + _VERSION_AND_SUM.size
    return batmap.header[:_VERSION_AT] + _VERSION_AND_SUM.pack(version, total) + batmap.header[after:], bits


def _may_have_batmap(footer: Footer) -> bool:
    return footer.creator[:3] == b"tap" and footer.creator_version >= 0x00010001


def _batmap_place(header: Header) -> int:
    return header.table_offset + round_up(4 * header.entries, SECTOR)


def _batmap_sum(bits: bytes, version: int) -> int:
    total = sum(bits) - (256 * sum(byte > 127 for byte in bits) if version == _SIGNED_SUMS else 0)
    return ~total & 0xFFFFFFFF


def _touches(used: Sequence[int], stride: int, start: int, stop: int) -> bool:
    """Return whether one of the sorted blocks overlaps bytes `start` to `stop`."""
    place = bisect_left(used, -(-stop // SECTOR))  # the first block that begins after the range
    return place > 0 and used[place - 1] * SECTOR + stride > start
