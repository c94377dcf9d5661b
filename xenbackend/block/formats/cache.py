"""The files of `cache:`: a header (`beside`), then slots for blocks.

Which slot has which block does not stand there: that is only known while the disk is attached (`block.cache_map`). So
no end of a worker or the host can make an old block look like a current one. But with mode=writeback each slot has a
tag of 8 bytes, little-endian, from HEADER_SIZE on: the number, and one more, of the block that is in this slot and
nowhere else, or 0 (`block.durable_tags`). The formats are ours. Must not open a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xenbackend.block.formats import beside
from xenbackend.block.formats.beside import MAX_BLOCK

DATA_AT = MAX_BLOCK  # bytes; where slot 0 is


@dataclass(frozen=True, slots=True)
class Header(beside.Header):
    """See the head of this file. `size` is that of all slots, and `base` is empty: any disk may use the file next."""

    LAYER: ClassVar[str] = "cache"
    MAGIC: ClassVar[bytes] = b"xenbackend bufs\n"

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return DATA_AT + self.blocks * self.block


@dataclass(frozen=True, slots=True)
class BackHeader(beside.MappedHeader):
    """That of a file with tags. `size` is that of all slots, and `base` is the layer below."""

    LAYER: ClassVar[str] = "cache"
    MAGIC: ClassVar[bytes] = b"xenbackend wrbk\n"
    ENTRY: ClassVar[int] = 8
