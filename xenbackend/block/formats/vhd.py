"""The headers of a VHD image: bytes to values and back.

Sources: "Virtual Hard Disk Image Format Specification", version 1.0 (Microsoft, 2006), sections "Hard Disk Footer
Format", "Dynamic Disk Header Format" and "Appendix: CHS Calculation"; libvhd is blktap's. All numbers are big-endian.
Must not open a file, nor take a size or an offset from an image without checking it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import partial

from xenbackend.block.formats import common
from xenbackend.block.formats.common import Read
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.units import SECTOR, format_size, round_up

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4  # Footer.type
MAX_SIZE = 2 << 40  # bytes: an entry of the table cannot address more sectors
MAX_NEW_SIZE = 2040 << 30  # bytes: QEMU (block/vpc.c) and libvhd read no larger ones; 2 TiB leave no room in the file
MAX_ENTRIES = 1 << 21  # as many blocks can be checked in a second: 1 TiB in blocks of 512 KiB, Windows' smallest
MIN_BLOCK, MAX_BLOCK = 4 << 10, 16 << 20  # bytes; 2 MiB and 512 KiB are in use
MAX_NEW_BLOCK = 2 << 20  # bytes: libvhd reads no larger ones
NO_OFFSET = (1 << 64) - 1
EPOCH = 946_684_800  # 2000-01-01 00:00 UTC as Unix time: timestamps count seconds from there

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sBB426x")
_HEADER = struct.Struct(">8sQQIIII16sI4x512s192s256x")
HEADER_SIZE = _HEADER.size  # bytes
_LOCATOR = struct.Struct(">4sII4xQ")
_COOKIE, _POISON, _HEADER_COOKIE = b"conectix", b"v_poison", b"cxsparse"
_VERSION = 0x00010000
_FOOTER_SUM, _HEADER_SUM = 64, 36  # where the checksums are
_LARGEST_CHS = 65535 * 16 * 255  # sectors
_BY_GEOMETRY = (b"vpc ", b"qemu")  # creators whose disks have the size of the geometry: Virtual PC, QEMU before 2.9


@dataclass(frozen=True, slots=True)
class Geometry:
    """Cylinders, heads, and sectors per track."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.cylinders * self.heads * self.sectors * SECTOR


@dataclass(frozen=True, slots=True)
class Footer:
    """The last 512 bytes of an image; a dynamic one has a copy at its beginning. Sizes and offsets are in bytes."""

    type: int
    current_size: int
    original_size: int
    geometry: Geometry
    uuid: bytes
    data_offset: int = NO_OFFSET
    timestamp: int = 0  # seconds since EPOCH
    creator: bytes = b"xenb"
    creator_version: int = 0x00010000
    creator_os: bytes = b"Wi2k"
    features: int = 2  # the reserved bit, which is always set
    version: int = _VERSION
    saved: int = 0
    hidden: int = 0  # libvhd: the disk of a snapshot, not to be used by itself

    @property
    def size(self) -> int:
        """The disk's size: the current size, or for some creators that of the geometry, as in QEMU."""
        by_geometry = self.creator in _BY_GEOMETRY and self.geometry.size < _LARGEST_CHS * SECTOR
        return self.geometry.size if by_geometry and self.geometry.size else self.current_size


@dataclass(frozen=True, slots=True)
class Locator:
    """The place of one name of the parent. Offset and length are in bytes."""

    code: bytes  # one of W2ru, W2ku, MacX and others
    space: int  # in sectors; libvhd and Windows write it in bytes
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a dynamic or differencing image. Sizes and offsets are in bytes."""

    table_offset: int
    entries: int
    block_size: int
    parent_uuid: bytes = bytes(16)  # zeros: the parent is a raw image (libvhd)
    parent_timestamp: int = 0  # seconds since EPOCH
    parent_name: bytes = b""  # UTF-16, big endian, without the zeros behind it
    locators: tuple[Locator, ...] = ()

    @property
    def bitmap_size(self) -> int:
        """The size in bytes of the bitmap before each block."""
        return round_up(self.block_size // SECTOR // 8, SECTOR)


damaged = partial(common.damaged, tool="xenbackend image check")


def title_of(footer: Footer) -> str:
    """Return the kind of an image, for people."""
    kinds = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}
    return f"VHD, {kinds.get(footer.type, f'type {footer.type}')}"


def checksum(data: bytes, place: int) -> int:
    """Return the ones' complement of the sum of all bytes, without the 4 of the checksum at `place`."""
    return ~(sum(data) - sum(data[place : place + 4])) & 0xFFFFFFFF


def geometry_of(size: int) -> Geometry:
    """Return the geometry for a size, which may be a little larger than the geometry's ("CHS Calculation")."""
    sectors = min(size // SECTOR, _LARGEST_CHS)
    if sectors >= 65535 * 16 * 63:
        per_track, heads = 255, 16
    else:
        per_track = 17
        tracks = sectors // per_track
        heads = max(4, (tracks + 1023) // 1024)
        if tracks >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            tracks = sectors // per_track
        if tracks >= heads * 1024:
            per_track, heads = 63, 16
    return Geometry(sectors // per_track // heads, heads, per_track)


def check_new_size(size: int) -> None:
    """Refuse a disk that other programs could not read. Raises: ConfigError."""
    if size > MAX_NEW_SIZE:
        problem = f"a VHD image holds up to {MAX_NEW_SIZE >> 30} GiB, not {format_size(size)}"
        raise ConfigError(f"{problem}: other programs read no larger one; use qcow2")


def pack_footer(footer: Footer) -> bytes:
    """Return the 512 bytes of a footer."""
    geometry = footer.geometry
    data = _FOOTER.pack(
        _COOKIE, footer.features, footer.version, footer.data_offset, footer.timestamp, footer.creator,
        footer.creator_version, footer.creator_os, footer.original_size, footer.current_size,
        geometry.cylinders, geometry.heads, geometry.sectors, footer.type, 0, footer.uuid, footer.saved, footer.hidden,
    )  # fmt: skip
    return _summed(data, _FOOTER_SUM)


def pack_header(header: Header) -> bytes:
    """Return the 1024 bytes of a header."""
    locators = b"".join(_LOCATOR.pack(each.code, each.space, each.length, each.offset) for each in header.locators)
    data = _HEADER.pack(
        _HEADER_COOKIE, NO_OFFSET, header.table_offset, _VERSION, header.entries, header.block_size, 0,
        header.parent_uuid, header.parent_timestamp, header.parent_name, locators,
    )  # fmt: skip
    return _summed(data, _HEADER_SUM)


def read_footer(read: Read, file_size: int) -> tuple[Footer, bool]:
    """Return the footer of an image, and whether it was found at the end, where it belongs.

    The copy at the beginning is read only if there is no footer at the end: a guest can write anything to the beginning
    of a fixed disk.

    Raises: DriverError if it is no VHD image, or is damaged, or marked as not to be used.
    """
    for place in (max(0, file_size - SECTOR), 0):
        data = read(place, SECTOR)
        if len(data) == SECTOR and data[:8] == _POISON:
            raise DriverError("it is marked as unusable by the program that made it (v_poison)")
        if len(data) == SECTOR and data[:8] == _COOKIE and _has_sum(data, _FOOTER_SUM):
            return _unpack_footer(data, file_size), place > 0
    raise DriverError(
        "it is not a VHD image: neither its end nor its beginning is a VHD footer with a correct checksum"
    )


def read_header(read: Read, footer: Footer, file_size: int) -> Header:
    """Return the header to which the footer of a dynamic or differencing image refers. Raises: DriverError."""
    data = read(footer.data_offset, _HEADER.size)
    if len(data) < _HEADER.size or data[:8] != _HEADER_COOKIE:
        raise damaged(f"there is no header at {footer.data_offset}")
    if not _has_sum(data, _HEADER_SUM):
        raise damaged("the checksum of its header is wrong")
    _, _, table, version, entries, block_size, _, uuid, timestamp, name, locators = _HEADER.unpack(data)
    if version != _VERSION:
        raise DriverError(f"its header has version {version:#x} and not {_VERSION:#x}, which is not supported")
    if block_size & (block_size - 1) or not MIN_BLOCK <= block_size <= MAX_BLOCK:
        raise DriverError(f"its blocks have {block_size} bytes and not a power of two from 4 KiB to 16 MiB")
    if not 0 < entries <= MAX_ENTRIES or entries * block_size < footer.size:
        raise damaged(f"its table has {entries} entries for {format_size(footer.size)}")
    if table % SECTOR or not SECTOR <= table < file_size or table + 4 * entries > file_size:
        raise damaged(f"its table is at {table}, which is not inside the file")
    found = (Locator(*each) for each in _LOCATOR.iter_unpack(locators))
    name = name.decode("utf-16-be", "replace").partition("\0")[0].encode("utf-16-be")
    return Header(table, entries, block_size, uuid, timestamp, name, tuple(each for each in found if any(each.code)))


def _unpack_footer(data: bytes, file_size: int) -> Footer:
    (
        _, features, version, data_offset, timestamp, creator, creator_version, creator_os, original, current,
        cylinders, heads, sectors, kind, _, uuid, saved, hidden,
    ) = _FOOTER.unpack(data)  # fmt: skip
    geometry = Geometry(cylinders, heads, sectors)
    footer = Footer(
        kind, current, original, geometry, uuid, data_offset, timestamp, creator, creator_version, creator_os,
        features, version, saved, hidden,
    )  # fmt: skip
    if version >> 16 != _VERSION >> 16:
        raise DriverError(f"it is of version {version:#x} of the format and not {_VERSION:#x}, which is not supported")
    if kind not in {FIXED, DYNAMIC, DIFFERENCING}:
        raise DriverError(f"it is of type {kind} and neither fixed, dynamic nor differencing (2, 3, 4)")
    if creator[:3] == b"tap" and creator_version == 1:
        name = printable(creator.decode("latin-1"))
        raise DriverError(
            f"it was made by {name!r} 0.1, whose bitmaps have their bits in reverse order; convert it with vhd-update"
        )
    if kind == FIXED:
        footer = replace(footer, data_offset=NO_OFFSET)
    elif data_offset % SECTOR or not SECTOR <= data_offset <= file_size - _HEADER.size:
        raise damaged(f"its header is at {data_offset}, which is not inside the file")
    if footer.size % SECTOR or not 0 < footer.size <= MAX_SIZE:
        raise damaged(f"its disk has {footer.size} bytes")
    return footer


def _summed(data: bytes, place: int) -> bytes:
    return data[:place] + struct.pack(">I", checksum(data, place)) + data[place + 4 :]


def _has_sum(data: bytes, place: int) -> bool:
    return int.from_bytes(data[place : place + 4], "big") == checksum(data, place)
