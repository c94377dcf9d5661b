"""The file of `cow:`: bytes to values.

    0           header, 4096 bytes: HEADER, then what the layer below was, as text, up to its length
    4096        map: one byte for each block of the disk
    data_at     the blocks, each at its place: block n at data_at + n * block; those that are not here are holes

A byte of the map is BASE (what the layer below has), OWN (the block is here) or ZEROS. It never becomes BASE again, and
no block that is OWN or ZEROS was BASE alone before, so a map of which only some writes have reached the medium is an
earlier map. Everything is little-endian. The format is ours. Must not open a file, nor take a number from a header
without having looked at it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from xenbackend.errors import DriverError
from xenbackend.units import round_up

BASE, OWN, ZEROS = 0, 1, 2
HEADER_SIZE = 4096  # bytes
MAGIC = b"xenbackend cow\r\n"
VERSION = 1
MIN_BLOCK, MAX_BLOCK = 4096, 1 << 20
_HEADER = struct.Struct("<16sIIQQII16s")  # magic, version, crc, size, block, length of the base's text, 0, token
_MAX_BASE = HEADER_SIZE - _HEADER.size


@dataclass(frozen=True, slots=True)
class Header:
    """What stands in the header: bytes of the disk and of a block, what the layer below was, and 16 bytes of chance.

    By the `token` this file is told from another one that has taken its name.
    """

    size: int
    block: int
    base: str
    token: bytes

    @property
    def blocks(self) -> int:
        """How many there are; the last one may be cut."""
        return -(-self.size // self.block)

    @property
    def map_size(self) -> int:
        """Bytes of the map, whole pages."""
        return round_up(self.blocks, 4096)

    @property
    def data_at(self) -> int:
        """Where block 0 would be, in bytes."""
        return round_up(HEADER_SIZE + self.map_size, MAX_BLOCK)

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return self.data_at + self.blocks * self.block

    def pack(self) -> bytes:
        """Return the header as it stands in the file. Raises: DriverError where the base's text is too long."""
        text = self.base.encode(errors="surrogateescape")
        if len(text) > _MAX_BASE:
            raise DriverError("the layer below is made of too many files to note what it was")
        values = [MAGIC, VERSION, 0, self.size, self.block, len(text), 0, self.token]
        values[2] = zlib.crc32(_HEADER.pack(*values) + text)
        return (_HEADER.pack(*values) + text).ljust(HEADER_SIZE, b"\0")


def parse(data: bytes) -> Header:
    """Return what a header says. Raises: DriverError."""
    if data[: len(MAGIC)] != MAGIC:
        raise DriverError("it is no file of cow:, and is left as it is; name another one")
    magic, version, crc, size, block, length, _, token = _HEADER.unpack_from(data)
    if version != VERSION:
        raise DriverError(f"it is of version {version} of the format, and this program knows version {VERSION}")
    text = data[_HEADER.size : _HEADER.size + min(length, _MAX_BASE)]
    if crc != zlib.crc32(_HEADER.pack(magic, version, 0, size, block, length, 0, token) + text) or length > _MAX_BASE:
        raise DriverError("its header is damaged: its checksum is wrong")
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1) or not 0 < size < 1 << 63:
        raise DriverError(f"its header is damaged: {size} bytes in blocks of {block}")
    return Header(size, block, text.decode(errors="surrogateescape"), token)
