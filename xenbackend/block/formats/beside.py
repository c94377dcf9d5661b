"""The header of a file that a filter keeps beside a disk: bytes to values.

    0    magic, version, crc, size, block, length of `base`, 0, token; then `base`, a text about the layer below

It takes HEADER_SIZE bytes; everything is little-endian. The formats are ours. Must not open a file, nor take a number
from a header without checking it.
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
    """The header's content: sizes of the disk and of a block in bytes, a text for the layer below, 16 random bytes.

    The random `token` distinguishes this file from another one that later has the same name. A subclass for each format
    sets LAYER, the driver's name for messages, its magic and its version.
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
        """The number of blocks; the last one may be shorter."""
        return -(-self.size // self.block)

    def pack(self) -> bytes:
        """Return the header's bytes. Raises: DriverError if `base` is too long."""
        text = self.base.encode(errors="surrogateescape")
        if len(text) > _MAX_BASE:
            raise DriverError("the layer below consists of too many files to record which they were")
        values = [self.MAGIC, self.VERSION, 0, self.size, self.block, len(text), 0, self.token]
        values[2] = zlib.crc32(_HEADER.pack(*values) + text)
        return (_HEADER.pack(*values) + text).ljust(HEADER_SIZE, b"\0")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse and check a header. Raises: DriverError."""
        if data[: len(cls.MAGIC)] != cls.MAGIC:
            raise DriverError(f"it is not a file of {cls.LAYER}:, and is left unchanged; name another one")
        magic, version, crc, size, block, length, _, token = _HEADER.unpack_from(data)
        if version != cls.VERSION:
            known = f"this program knows version {cls.VERSION}"
            raise DriverError(f"it has version {version} of the format, but {known}")
        text = data[_HEADER.size : _HEADER.size + min(length, _MAX_BASE)]
        whole = _HEADER.pack(magic, version, 0, size, block, length, 0, token) + text
        if crc != zlib.crc32(whole) or length > _MAX_BASE:
            raise DriverError("its header is damaged: its checksum is wrong")
        if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1) or not 0 < size < 1 << 63:
            raise DriverError(f"its header is damaged: {size} bytes in blocks of {block}")
        return cls(size, block, text.decode(errors="surrogateescape"), token)


@dataclass(frozen=True, slots=True)
class MappedHeader(Header):
    """The header of a file that has a map after it, of ENTRY bytes for each block, and then the blocks."""

    ENTRY: ClassVar[int]

    @property
    def map_size(self) -> int:
        """The map's size in bytes, whole pages."""
        return round_up(self.ENTRY * self.blocks, PAGE)

    @property
    def data_at(self) -> int:
        """The place of block 0, in bytes."""
        return round_up(HEADER_SIZE + self.map_size, MAX_BLOCK)

    @property
    def file_size(self) -> int:
        """The file's size in bytes."""
        return self.data_at + self.blocks * self.block
