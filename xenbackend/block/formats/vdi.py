"""VDI images: bytes to values.

Source: VirtualBox, ``src/VBox/Storage/VDICore.h``, and QEMU, ``block/vdi.c``. A map has a number for each block of the
disk: its index among the blocks of the file, which follow the header and the map. Must not open a file, nor take a size
or an offset from an image without checking it.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

from xenbackend.block.formats.common import Read, damaged
from xenbackend.block.formats.layout import MIN_CLUSTER_BITS, Shape, check_places, power_of
from xenbackend.block.formats.words import unpack
from xenbackend.block.mapped.tables import READABLE, ZERO
from xenbackend.errors import DriverError
from xenbackend.units import round_up

SIGNATURE = 0xBEDA107F
FREE, DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE  # in the map: the block is not in the file; reads as zeros
TYPES = {1: "dynamic", 2: "fixed"}  # 3 is undo, 4 a differencing image
_MAX_BLOCKS = 0x3FFFFFFF  # as in QEMU
_MAX_BLOCK_BITS = 30
_TABLE_BITS = 9
_HEADER = struct.Struct("<64sIIIII256sIIIIIIIQIIII")


@dataclass(frozen=True, slots=True)
class Image:
    """The content of a header, with every number checked; a `Layout`."""

    shape: Shape
    kind: str
    map_offset: int  # bytes
    data_offset: int  # bytes
    blocks: int

    def table_at(self, number: int) -> tuple[int, int]:
        """See `Layout`."""
        first = number << _TABLE_BITS
        return self.map_offset + first * 4, min(1 << _TABLE_BITS, self.blocks - first) * 4

    def decode(self, data: bytes) -> array[int]:
        """See `Layout`."""
        bits, start = self.shape.cluster_bits, self.data_offset
        words = unpack("I", data, "little")
        entries = array("Q", [ZERO if each >= DISCARDED else start + (each << bits) | READABLE for each in words])
        check_places(entries, self.shape.file_size)
        return entries


def parse(read: Read, file_size: int) -> Image:
    """Parse the header of an image.

    Args:
        read: reads the image file.
        file_size: the image file's size in bytes.

    Raises: DriverError if it is no VDI image, or is damaged, or depends on another image.
    """
    start = read(0, _HEADER.size)
    if len(start) < _HEADER.size or int.from_bytes(start[64:68], "little") != SIGNATURE:
        raise DriverError("it is not a VDI image: it lacks the signature")
    (
        _, _, version, _, kind, _, _, map_offset, data_offset, _, _, _, _, _, size, block_size, extra, blocks, _,
    ) = _HEADER.unpack(start)  # fmt: skip
    if version >> 16 != 1:
        raise DriverError(f"it is a VDI image of version {version >> 16} and not 1; convert it with qemu-img convert")
    if kind not in TYPES:
        raise DriverError(
            f"it is a VDI image of type {kind}, which needs a parent; make a complete image with VBoxManage clonemedium"
        )
    bits = power_of(block_size)
    if not MIN_CLUSTER_BITS <= bits <= _MAX_BLOCK_BITS or extra:
        raise damaged(f"its blocks have {block_size} bytes, and {extra} bytes between them")
    if not blocks <= _MAX_BLOCKS or blocks << bits < size:
        raise damaged(f"its {blocks} blocks of {block_size} bytes do not make a disk of {size}")
    if map_offset % 512 or data_offset % 512 or map_offset < _HEADER.size or map_offset + blocks * 4 > data_offset:
        raise damaged(f"its map is at byte {map_offset} and its blocks at {data_offset}, which is not possible")
    if map_offset + blocks * 4 > file_size:
        raise damaged(f"its map of {blocks * 4} bytes is not inside the file of {file_size}")
    shape = Shape(round_up(size, 512), bits, _TABLE_BITS, file_size)
    return Image(shape, TYPES[kind], map_offset, data_offset, blocks)
