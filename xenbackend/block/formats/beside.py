"""The header of a file that a filter keeps beside a disk: bytes to values.

    0    magic, version, crc, size, block, length of the base's text, 0, token; then what the layer below was, as text

It takes HEADER_SIZE bytes; everything is little-endian. The formats are ours. Must not open a file, nor take a number
from a header without having looked at it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import ClassVar, Self

from xenbackend.errors import DriverError
from xenbackend.units import PAGE, round_up

HEADER_SIZE = 4096  # bytes
MIN_BLOCK, MAX_BLOCK = 4096, 1 << 20
_HEADER = struct.Struct("<16sIIQQII16s")
_MAX_BASE = HEADER_SIZE - _HEADER.size


@dataclass(frozen=True, slots=True)
class Header:
    """What stands in the header: bytes of the disk and of a block, what the layer below was, and 16 bytes of chance.

    By the `token` this file is told from another one that has taken its name. A format is a subclass: its driver's
    name, by which people know it, its magic and its version.
    """

    LAYER: ClassVar[str]
    MAGIC: ClassVar[bytes]
    VERSION: ClassVar[int] = 1

    size: int
    block: int
    base: str
    token: bytes

    @property
    def blocks(self) -> int:
        """How many there are; the last one may be cut."""
        return -(-self.size // self.block)

    def pack(self) -> bytes:
        """Return the header as it stands in the file. Raises: DriverError where the base's text is too long."""
        text = self.base.encode(errors="surrogateescape")
        if len(text) > _MAX_BASE:
            raise DriverError("the layer below is made of too many files to note what it was")
        values = [self.MAGIC, self.VERSION, 0, self.size, self.block, len(text), 0, self.token]
        values[2] = zlib.crc32(_HEADER.pack(*values) + text)
        return (_HEADER.pack(*values) + text).ljust(HEADER_SIZE, b"\0")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return what a header says. Raises: DriverError."""
        if data[: len(cls.MAGIC)] != cls.MAGIC:
            raise DriverError(f"it is no file of {cls.LAYER}:, and is left as it is; name another one")
        magic, version, crc, size, block, length, _, token = _HEADER.unpack_from(data)
        if version != cls.VERSION:
            known = f"this program knows version {cls.VERSION}"
            raise DriverError(f"it is of version {version} of the format, and {known}")
        text = data[_HEADER.size : _HEADER.size + min(length, _MAX_BASE)]
        whole = _HEADER.pack(magic, version, 0, size, block, length, 0, token) + text
        if crc != zlib.crc32(whole) or length > _MAX_BASE:
            raise DriverError("its header is damaged: its checksum is wrong")
        if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1) or not 0 < size < 1 << 63:
            raise DriverError(f"its header is damaged: {size} bytes in blocks of {block}")
        return cls(size, block, text.decode(errors="surrogateescape"), token)


@dataclass(frozen=True, slots=True)
class MappedHeader(Header):
    """That of a file which has a map behind its header, of ENTRY bytes for each block, and the blocks behind that."""

    ENTRY: ClassVar[int]

    @property
    def map_size(self) -> int:
        """Bytes of the map, whole pages."""
        return round_up(self.ENTRY * self.blocks, PAGE)

    @property
    def data_at(self) -> int:
        """Where block 0 would be, in bytes."""
        return round_up(HEADER_SIZE + self.map_size, MAX_BLOCK)

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return self.data_at + self.blocks * self.block
