"""VMDK images that are one file: bytes to values.

Source: VMware, "Virtual Disk Format 5.0" (hosted sparse extents, stream-optimized ones among them), and QEMU,
``block/vmdk.c``. A directory in memory names the tables, and these the grains. Must not open a file, nor take a size or
an offset from an image without having looked at it.
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from dataclasses import dataclass
from typing import Any

from xenbackend.block.formats.layout import MIN_CLUSTER_BITS, Read, Shape, check_places, damaged, power_of, unpack
from xenbackend.block.mapped.tables import READABLE, SPECIAL, ZERO
from xenbackend.errors import DriverError
from xenbackend.units import format_size

MAGIC = b"KDMV"
NO_PARENT = 0xFFFFFFFF  # as a content ID
MARKER = 12  # bytes before a compressed grain: its first sector on the disk, and how many bytes follow
_SECTOR = 512
_ZERO_GRAINS, _COMPRESSED, _MARKERS = 1 << 2, 1 << 16, 1 << 17  # flags of the header
_AT_END = (1 << 64) - 1  # as the place of the directory: a second header at the end of the file says it
_TABLE_BITS = 9  # the format has no other tables
_MAX_GRAIN_BITS = 20
_MAX_DIRECTORY = 16 << 20  # bytes
_MAX_DESCRIPTOR = 1 << 20  # bytes
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_NEWLINES = b"\n \r\n"
_OTHERS = {
    b"COWD": "of ESX's format COWD",
    b"\xbe\xba\xfe\xca": "of ESXi's format SE sparse",
    b"# Di": "the names only",
}
_EXTENT = re.compile(rb"^(?:RW|RDONLY|NOACCESS)[ \t]+\d+[ \t]+(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What the text inside an image says."""

    cid: int  # changes with the content
    parent_cid: int
    parent: bytes  # the name of its file


@dataclass(frozen=True, slots=True)
class Image:
    """What an image says, every number of it checked; a `Layout`."""

    shape: Shape
    is_compressed: bool
    has_zero_grains: bool
    directory: array[int]  # places of tables, in sectors
    descriptor: Descriptor

    def table_at(self, number: int) -> tuple[int, int]:
        """See `Layout`."""
        place = self.directory[number] * _SECTOR
        return place, 4 << _TABLE_BITS if place else 0

    def decode(self, data: bytes) -> array[int]:
        """See `Layout`."""
        flag = SPECIAL if self.is_compressed else READABLE
        entries = array("Q", [each * _SECTOR | flag if each else 0 for each in unpack("I", data)])
        if self.has_zero_grains:
            entries = array("Q", [ZERO if each == _SECTOR | flag else each for each in entries])
        check_places(entries, self.shape.file_size)
        return entries

    def inflate(self, sector: int, data: bytes) -> bytes:
        """Return the grain that begins at `sector` of the disk, from its marker on. Raises: DriverError."""
        size = 1 << self.shape.cluster_bits
        found, length = struct.unpack_from("<QI", data) if len(data) >= MARKER else (-1, 0)
        if found != sector:
            raise damaged(f"where the grain of sector {sector} should be is that of sector {found}")
        try:
            grain = zlib.decompressobj().decompress(data[MARKER : MARKER + length], size)
        except zlib.error as error:
            raise damaged(f"a compressed grain cannot be read: {error}") from error
        if len(grain) != min(size, self.shape.size - sector * _SECTOR) and len(grain) != size:
            raise damaged(f"a compressed grain gives {len(grain)} bytes and not {size}")
        return grain.ljust(size, b"\0")


def parse(read: Read, file_size: int) -> Image:
    """Return what an image says.

    Args:
        read: reads the image file.
        file_size: bytes of the image file.

    Raises: DriverError, where it is no VMDK image of one file, or a damaged one.
    """
    fields = _fields(read, 0)
    if fields[9] == _AT_END:
        fields = _fields(read, file_size - 2 * _SECTOR)
    _, _, flags, capacity, grain, text_at, text_length, per_table, _, directory_at, _, _, newlines, algorithm = fields
    if newlines != _NEWLINES:
        raise damaged("its line ends were altered, as by a transfer in text mode")
    bits = power_of(grain * _SECTOR)
    if not MIN_CLUSTER_BITS <= bits <= _MAX_GRAIN_BITS or per_table != 1 << _TABLE_BITS:
        raise damaged(f"its grains have {grain} sectors, and its tables {per_table} of them")
    is_compressed = bool(flags & _COMPRESSED)
    if is_compressed and not (flags & _MARKERS and algorithm == 1):
        raise DriverError(
            f"it is compressed by method {algorithm}, which is not known; convert it with qemu-img convert"
        )
    shape = Shape(capacity * _SECTOR, bits, _TABLE_BITS, file_size)
    return Image(
        shape, is_compressed, bool(flags & _ZERO_GRAINS), _directory(read, shape, directory_at * _SECTOR),
        _descriptor(read, text_at * _SECTOR, text_length * _SECTOR),
    )  # fmt: skip


def _fields(read: Read, place: int) -> tuple[Any, ...]:
    data = read(max(0, place), _HEADER.size)
    if len(data) < _HEADER.size or data[:4] != MAGIC:
        other = _OTHERS.get(data[:4])
        if other:
            raise DriverError(f"it is {other}; make one file of the disk by qemu-img convert -O vmdk")
        raise DriverError("it is no VMDK image: it does not begin as one")
    return _HEADER.unpack(data)


def _directory(read: Read, shape: Shape, place: int) -> array[int]:
    length = shape.tables * 4
    if length > _MAX_DIRECTORY:
        raise damaged(f"its {format_size(shape.size)} need a directory of {length} bytes")
    if not 0 < place <= shape.file_size - length:
        raise damaged(f"its directory of {length} bytes at byte {place} is not inside the file of {shape.file_size}")
    directory = unpack("I", read(place, length))
    last = max(directory, default=0) * _SECTOR
    if last + (4 << _TABLE_BITS) > shape.file_size:
        raise damaged(f"a table is at byte {last}, and the file has {shape.file_size}")
    return directory


def _descriptor(read: Read, place: int, length: int) -> Descriptor:
    text = read(place, length).split(b"\0")[0] if place and length <= _MAX_DESCRIPTOR else b""
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition(b"=")
        values[key.strip().lower()] = value.strip().strip(b'"')
    kinds = [match[1] for match in _EXTENT.finditer(text)]
    if kinds != [b"SPARSE"]:
        problem = f"it is one of {len(kinds)} parts of a disk" if text else "it is a part of a disk in several files"
        raise DriverError(f"{problem}; make one file of the disk by qemu-img convert -O vmdk")
    try:
        cid, parent_cid = (int(values.get(key, b"ffffffff"), 16) for key in (b"cid", b"parentcid"))
    except ValueError:
        raise damaged("a content ID of its descriptor is no number") from None
    return Descriptor(cid, parent_cid, values.get(b"parentfilenamehint", b""))
