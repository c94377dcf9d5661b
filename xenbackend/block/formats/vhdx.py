"""VHDX images: bytes to values.

Source: Microsoft, [MS-VHDX] 2.2 to 2.6. There are two headers, of which the newer one counts, and a region table, which
places the block allocation table (BAT) and the metadata. For each chunk of blocks the BAT has their entries, then one
for a bitmap, which only differencing images use. Must not open a file, nor take a size or an offset from an image
without checking it.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from uuid import UUID

from xenbackend.block.formats import vhdx_log
from xenbackend.block.formats.common import Read, damaged
from xenbackend.block.formats.crc32c import crc32c
from xenbackend.block.formats.layout import Shape, check_places, power_of
from xenbackend.block.formats.words import unpack
from xenbackend.block.mapped.tables import READABLE, ZERO
from xenbackend.errors import DriverError

_MIB = 1 << 20
_HEADERS, _HEADER_LENGTH = (64 << 10, 128 << 10), 4096
_REGIONS, _REGIONS_LENGTH = (192 << 10, 256 << 10), 64 << 10
_MAX_ENTRIES = 2047  # of a table of regions or metadata
_MAX_ITEM = 64  # bytes of an item that are read
_PLACE = (1 << 64) - _MIB  # of an entry of the BAT; the lowest three bits are its state
_PRESENT, _PARTIAL = 6, 7  # states; 0 to 3 read as zeros, 4 and 5 are reserved
_MAX_SIZE = 64 << 40  # bytes
_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_ENTRY = struct.Struct("<16sQII")  # of the region table
_ITEM = struct.Struct("<16sIII")  # of the metadata
_BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_PHYSICAL = UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_KNOWN = {  # with the ID of the disk
    PARAMETERS, DISK_SIZE, _SECTOR_SIZE, _PHYSICAL, UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le,
    PARENT_LOCATOR,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """The headers of an image, with every number checked; a `Layout`."""

    shape: Shape
    bat: int  # bytes
    blocks: int
    log: vhdx_log.Replay | None = None  # changes that an unclean end left in the log; the file has to be read with them

    def table_at(self, number: int) -> tuple[int, int]:
        """See `Layout`. A table is a chunk."""
        first = number << self.shape.table_bits
        return self.bat + (first + number) * 8, min(1 << self.shape.table_bits, self.blocks - first) * 8

    def decode(self, data: bytes) -> array[int]:
        """See `Layout`."""
        words = unpack("Q", data, "little")
        states = {word & 7 for word in words}
        if states - {0, 1, 2, 3, _PRESENT}:
            raise damaged(f"a block is in state {max(states)}, which is not a valid state")
        entries = array("Q", [word & _PLACE | READABLE if word & 7 == _PRESENT else ZERO for word in words])
        check_places(entries, self.shape.file_size)
        return entries


def parse(read: Read, file_size: int) -> Image:
    """Parse the headers of an image.

    Args:
        read: reads the image file.
        file_size: the image file's size in bytes.

    Raises: DriverError if it is no VHDX image, or is damaged, or has a parent.
    """
    if read(0, 8) != b"vhdxfile":
        raise DriverError("it is not a VHDX image: it does not begin as one")
    log = _log(read, file_size)
    if log is not None:
        read, file_size = log.changes.reader(read, log.size), log.size
    regions = _regions(read, file_size)
    place, length = regions[METADATA]
    items = _items(read, place, length)
    size, block_size, sector_size = _numbers(items)
    block_bits = power_of(block_size)
    if not 20 <= block_bits <= 28 or sector_size not in (512, 4096):
        raise damaged(f"its blocks have {block_size} bytes, and its sectors {sector_size}")
    if not size <= _MAX_SIZE or size % sector_size:
        raise damaged(f"its disk has {size} bytes")
    table_bits = power_of(sector_size << 23) - block_bits
    shape = Shape(size, block_bits, table_bits, file_size, sector_size, _physical(items, sector_size))
    blocks = -(-size >> block_bits)
    bat, room = regions[_BAT]
    if (blocks + max(0, shape.tables - 1)) * 8 > room:
        raise damaged(f"its table of {room} bytes is too small for {blocks} blocks")
    return Image(shape, bat, blocks, log)


def _checked(read: Read, place: int, length: int, signature: bytes) -> bytes:
    """Return a structure that has its checksum at byte 4, or nothing if that is wrong."""
    data = read(place, length)
    is_whole = len(data) == length and data[:4] == signature
    return data if is_whole and crc32c(data[:4] + bytes(4) + data[8:]) == int.from_bytes(data[4:8], "little") else b""


def _log(read: Read, file_size: int) -> vhdx_log.Replay | None:
    """Return the replay of the log to which the newer of both headers refers; None if the log is empty."""
    headers = [
        _HEADER.unpack_from(data) for place in _HEADERS if (data := _checked(read, place, _HEADER_LENGTH, b"head"))
    ]
    if not headers:
        raise damaged("neither of its headers has a correct checksum")
    _, _, _, _, _, log, log_version, version, length, place = max(headers, key=lambda header: header[2])
    if version != 1:
        raise DriverError(f"it is a VHDX image of version {version} and not 1; convert it with qemu-img convert")
    if not any(log):
        return None
    if log_version:
        raise DriverError(f"its log is of version {log_version} and not 0; start and stop its guest under Hyper-V")
    return vhdx_log.replay(read, file_size, log, place, length)


def _regions(read: Read, file_size: int) -> dict[bytes, tuple[int, int]]:
    """Return the place and length, in bytes, of both regions."""
    data = next(filter(None, (_checked(read, place, _REGIONS_LENGTH, b"regi") for place in _REGIONS)), b"")
    count = int.from_bytes(data[8:12], "little")
    if not data or count > _MAX_ENTRIES:
        raise damaged("neither of its region tables is valid")
    regions = {}
    for guid, place, length, is_required in _entries(_ENTRY, data, 16, count):
        if guid in (_BAT, METADATA):
            if place < _MIB or place % _MIB or length % _MIB or place + length > file_size:
                raise damaged(f"a region of {length} bytes at byte {place} is not inside the file of {file_size}")
            regions[guid] = place, length
        elif is_required & 1:
            raise DriverError(f"it requires the region {UUID(bytes_le=guid)}, which is not supported")
    if len(regions) != 2:
        raise damaged("a region that every image has is missing")
    return regions


def _items(read: Read, place: int, length: int) -> dict[bytes, bytes]:
    """Return the metadata items that we know, by their GUID."""
    table = read(place, min(length, _REGIONS_LENGTH))
    count = int.from_bytes(table[10:12], "little")
    if table[:8] != b"metadata" or count > _MAX_ENTRIES:
        raise damaged("its table of metadata is missing")
    items = {}
    for guid, offset, item_length, flags in _entries(_ITEM, table, 32, count):
        if guid in _KNOWN:
            if offset + item_length > length:
                raise damaged(f"an item of {item_length} bytes at byte {offset} is not inside the metadata of {length}")
            items[guid] = read(place + offset, min(item_length, _MAX_ITEM))
        elif flags & 4:
            raise DriverError(f"it requires the metadata item {UUID(bytes_le=guid)}, which is not supported")
    return items


def _entries(entry: struct.Struct, table: bytes, first: int, count: int) -> list[tuple[bytes, int, int, int]]:
    """Return the entries of a table, each of 32 bytes."""
    return [entry.unpack_from(table, place) for place in range(first, min(first + count * 32, len(table) - 31), 32)]


def _numbers(items: dict[bytes, bytes]) -> tuple[int, int, int]:
    """Return the sizes of the disk, of a block and of a sector, in bytes."""
    try:
        block_size, flags = struct.unpack_from("<II", items[PARAMETERS])
        (size,), (sector_size,) = (
            struct.unpack_from("<Q", items[DISK_SIZE]),
            struct.unpack_from("<I", items[_SECTOR_SIZE]),
        )
    except (KeyError, struct.error):
        raise damaged("its size, or that of its blocks or sectors, is missing") from None
    if flags & 2:
        raise DriverError(
            "it has a parent, which is not supported; merge them into one file with Hyper-V's Convert-VHD"
        )
    return size, block_size, sector_size


def _physical(items: dict[bytes, bytes], sector_size: int) -> int:
    """Return the disk's physical sector size in bytes: 4096, or else, also for an invalid value, that of a sector."""
    return 4096 if items.get(_PHYSICAL) == struct.pack("<I", 4096) else sector_size
