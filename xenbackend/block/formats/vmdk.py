"""Sparse files of VMDK disks, with grains and tables: bytes to values.

Source: VMware, "Virtual Disk Format 5.0" (hosted sparse extents, stream-optimized ones among them), and QEMU,
``block/vmdk.c`` (also for COWD, the sparse extents of ESX). A directory in memory has the places of the tables, and
these have the places of the grains. Must not open a file, nor take a size or an offset from an image without checking
it.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from dataclasses import dataclass
from typing import Any

from xenbackend.block.formats.common import Read, damaged
from xenbackend.block.formats.layout import MIN_CLUSTER_BITS, Shape, check_places, power_of
from xenbackend.block.formats.vmdk_descriptor import MAX_LENGTH, SPARSE, Descriptor
from xenbackend.block.formats.vmdk_descriptor import parse as parse_descriptor
from xenbackend.block.formats.words import unpack
from xenbackend.block.mapped.tables import READABLE, SPECIAL, ZERO
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR, format_size

MAGIC = b"KDMV"
MAX_DIRECTORY = 16 << 20  # bytes, for all files of a disk together
MARKER = 12  # bytes before a compressed grain: its first sector on the disk, and how many bytes follow
_ZERO_GRAINS, _COMPRESSED, _MARKERS = 1 << 2, 1 << 16, 1 << 17  # flags of the header
_AT_END = (1 << 64) - 1  # as the place of the directory: a second header, at the end of the file, has it
_TABLE_BITS = 9  # the format has no other tables
_MAX_GRAIN_BITS = 20
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_NEWLINES = b"\n \r\n"
_COWD_MAGIC = b"COWD"
_COWD_HEADER = struct.Struct("<4sIIIIII")  # magic, version, flags, sectors, sectors of a grain, directory, its entries
_COWD_TABLE_BITS = 12
_OTHERS = {
    _COWD_MAGIC: "of ESX's format COWD",
    b"\xbe\xba\xfe\xca": "of ESXi's format SE sparse",
}


@dataclass(frozen=True, slots=True)
class Image:
    """The content of a sparse file's header, with every number checked; a `Layout`."""

    shape: Shape
    is_compressed: bool
    has_zero_grains: bool
    directory: array[int]  # places of tables, in sectors
    descriptor: Descriptor

    def table_at(self, number: int) -> tuple[int, int]:
        """See `Layout`."""
        place = self.directory[number] * SECTOR
        return place, 4 << self.shape.table_bits if place else 0

    def decode(self, data: bytes) -> array[int]:
        """See `Layout`."""
        flag = SPECIAL if self.is_compressed else READABLE
        entries = array("Q", [each * SECTOR | flag if each else 0 for each in unpack("I", data, "little")])
        if self.has_zero_grains:
            entries = array("Q", [ZERO if each == SECTOR | flag else each for each in entries])
        check_places(entries, self.shape.file_size)
        return entries

    def inflate(self, sector: int, data: bytes) -> bytes:
        """Return the grain that begins at `sector` of the disk; `data` begin with its marker. Raises: DriverError."""
        size = 1 << self.shape.cluster_bits
        found, length = struct.unpack_from("<QI", data) if len(data) >= MARKER else (-1, 0)
        if found != sector:
            raise damaged(f"in the place of the grain of sector {sector} is that of sector {found}")
        try:
            grain = zlib.decompressobj().decompress(data[MARKER : MARKER + length], size)
        except zlib.error as error:
            raise damaged(f"a compressed grain cannot be read: {error}") from error
        if len(grain) != min(size, self.shape.size - sector * SECTOR) and len(grain) != size:
            raise damaged(f"a compressed grain gives {len(grain)} bytes and not {size}")
        return grain.ljust(size, b"\0")


def parse(read: Read, file_size: int, *, is_part: bool = False) -> Image:
    """Parse the header of a sparse file.

    Args:
        read: reads the image file.
        file_size: the image file's size in bytes.
        is_part: a descriptor in another file names this one; else the file has to be a whole disk.

    Raises: DriverError if it is no such file, or is damaged.
    """
    fields = _fields(read, 0)
    if fields[9] == _AT_END:
        fields = _fields(read, file_size - 2 * SECTOR)
    _, _, flags, capacity, grain, text_at, text_length, per_table, _, directory_at, _, _, newlines, algorithm = fields
    if newlines != _NEWLINES:
        raise damaged("its line ends were changed, as by a transfer in text mode; copy it again in binary mode")
    bits = power_of(grain * SECTOR)
    if not MIN_CLUSTER_BITS <= bits <= _MAX_GRAIN_BITS or per_table != 1 << _TABLE_BITS:
        raise damaged(f"its grains have {grain} sectors, and its tables {per_table} of them")
    is_compressed = bool(flags & _COMPRESSED)
    if is_compressed and not (flags & _MARKERS and algorithm == 1):
        raise DriverError(
            f"it is compressed by method {algorithm}, which is not known; convert it with qemu-img convert"
        )
    shape = Shape(capacity * SECTOR, bits, _TABLE_BITS, file_size)
    directory = _directory(read, shape, directory_at * SECTOR)
    descriptor = _NO_DESCRIPTOR if is_part else _descriptor(read, text_at * SECTOR, text_length * SECTOR)
    return Image(shape, is_compressed, bool(flags & _ZERO_GRAINS), directory, descriptor)


def parse_cowd(read: Read, file_size: int) -> Image:
    """Parse the header of a sparse extent of ESX (COWD, "vmfsSparse"). Raises: DriverError if it is damaged."""
    data = read(0, _COWD_HEADER.size)
    if len(data) < _COWD_HEADER.size or data[:4] != _COWD_MAGIC:
        raise DriverError("it is not an extent of the format COWD: it does not begin as one")
    _, _, _, sectors, grain, directory_at, _ = _COWD_HEADER.unpack(data)
    bits = power_of(grain * SECTOR)
    if not MIN_CLUSTER_BITS <= bits <= _MAX_GRAIN_BITS:
        raise damaged(f"its grains have {grain} sectors")
    shape = Shape(sectors * SECTOR, bits, _COWD_TABLE_BITS, file_size)
    directory = _directory(read, shape, directory_at * SECTOR)
    return Image(shape, is_compressed=False, has_zero_grains=False, directory=directory, descriptor=_NO_DESCRIPTOR)


def _fields(read: Read, place: int) -> tuple[Any, ...]:
    data = read(max(0, place), _HEADER.size)
    if len(data) < _HEADER.size or data[:4] != MAGIC:
        other = _OTHERS.get(data[:4])
        if other:
            raise DriverError(f"it is a part of a disk, {other}; open the descriptor, the small file that names it")
        raise DriverError("it is not a VMDK image: it does not begin as one")
    return _HEADER.unpack(data)


def _directory(read: Read, shape: Shape, place: int) -> array[int]:
    length = shape.tables * 4
    if length > MAX_DIRECTORY:
        raise damaged(f"its {format_size(shape.size)} need a directory of {length} bytes")
    if not 0 < place <= shape.file_size - length:
        raise damaged(f"its directory of {length} bytes at byte {place} is not inside the file of {shape.file_size}")
    directory = unpack("I", read(place, length), "little")
    last = max(directory, default=0) * SECTOR
    if last + (4 << shape.table_bits) > shape.file_size:
        raise damaged(f"a table is at byte {last}, and the file has {shape.file_size}")
    return directory


def _descriptor(read: Read, place: int, length: int) -> Descriptor:
    text = read(place, length).split(b"\0")[0] if place and length <= MAX_LENGTH else b""
    descriptor = parse_descriptor(text)
    if [each.kind for each in descriptor.extents] != [SPARSE]:
        parts = len(descriptor.extents)
        if text and not parts:
            raise damaged("its descriptor names no extent")
        problem = f"it is one of {parts} parts of a disk" if text else "it is a part of a disk in several files"
        raise DriverError(f"{problem}; open the descriptor, the small file that names them")
    return descriptor


_NO_DESCRIPTOR = parse_descriptor(b"")
