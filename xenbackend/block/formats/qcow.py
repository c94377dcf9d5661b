"""QCOW images of version 1: bytes to values.

Source: QEMU, ``block/qcow.c``, `QCowHeader` and `get_cluster_offset`. All numbers are big-endian. There are no
refcounts: new clusters are put at the end of the file. Must not open a file, nor take a size or an offset from an image
without checking it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xenbackend.block.formats.common import Read, damaged
from xenbackend.block.formats.qcow2 import MAGIC, MAX_L1_BYTES, MAX_NAME, Region
from xenbackend.errors import DriverError
from xenbackend.units import format_size

COMPRESSED = 1 << 63  # of an entry of an L2 table
_HEADER = struct.Struct(">4sIQIIQBBHIQ")


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a header, with every number checked. Sizes and offsets are in bytes."""

    size: int
    cluster_bits: int
    l2_bits: int  # an L2 table has 1 << l2_bits entries
    l1: Region
    backing_file: bytes  # empty if the image has no parent; the image does not say which format that has

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits


def parse_header(read: Read, file_size: int) -> Header:
    """Parse the header of an image.

    Args:
        read: reads the image file.
        file_size: the image file's size in bytes.

    Raises: DriverError if it is no QCOW image of version 1, or is damaged or encrypted.
    """
    start = read(0, _HEADER.size)
    if len(start) < _HEADER.size or start[:4] != MAGIC:
        raise DriverError("it is not a QCOW image: it does not begin as one")
    (
        _, version, backing_offset, backing_length, _, size, cluster_bits, l2_bits, _, crypt_method, l1_offset,
    ) = _HEADER.unpack(start)  # fmt: skip
    if version != 1:
        hint = "; write qcow2: for it" if version in (2, 3) else ""
        raise DriverError(f"it is a QCOW image of version {version} and not 1{hint}")
    if not (9 <= cluster_bits <= 16 and 6 <= l2_bits <= 13):
        raise damaged(f"its clusters have 2^{cluster_bits} bytes, and its L2 tables 2^{l2_bits} entries")
    if crypt_method:
        raise DriverError("it is encrypted, which is not supported; decrypt it with qemu-img convert")
    if size % 512:
        raise DriverError(f"its size, {size} bytes, is not a multiple of 512; convert it with qemu-img convert")
    l1 = Region(l1_offset, -(-size >> (cluster_bits + l2_bits)) * 8)
    if l1.length > MAX_L1_BYTES:
        raise damaged(f"its {format_size(size)} need an L1 table of {l1.length} bytes")
    if l1_offset % 8 or not _HEADER.size <= l1_offset <= file_size - l1.length:
        raise damaged(f"its L1 table of {l1.length} bytes at byte {l1_offset} is not inside the file of {file_size}")
    backing = b""
    if backing_offset:
        backing = read(backing_offset, backing_length) if backing_length <= MAX_NAME else b""
        if len(backing) != backing_length or b"\0" in backing:
            raise damaged(f"the name of its parent has {backing_length} bytes at byte {backing_offset}")
    return Header(size, cluster_bits, l2_bits, l1, backing)


def compressed_place(entry: int, cluster_bits: int) -> Region:
    """Return the range of the file that has a compressed cluster."""
    offset_bits = 63 - cluster_bits
    offset = entry & ((1 << offset_bits) - 1)
    return Region(offset, (entry & ~COMPRESSED) >> offset_bits)
