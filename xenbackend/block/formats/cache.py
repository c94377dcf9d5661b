"""The files of `cache:`, bytes to values: a header (`beside`), then slots for blocks.

The file does not say which slot has which block: that is in memory while the disk is attached (`block.cache_map`). So
no crash of a worker or the host can make an old block look like a current one. But with mode=writeback each slot has a
tag of 8 bytes, little-endian, from HEADER_SIZE on: the number plus one of the dirty block in this slot, or 0
(`block.durable_tags`). The formats are ours. Must not open a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xenbackend.block.formats import beside
from xenbackend.block.formats.beside import MAX_BLOCK

DATA_AT = MAX_BLOCK  # byte in the file at which slot 0 begins, without tags


@dataclass(frozen=True, slots=True)
class Header(beside.Header):
    """The header of a file without tags. `size` is that of all slots; `base` is empty, as any disk may use the file."""

    LAYER: ClassVar[str] = "cache"
    MAGIC: ClassVar[bytes] = b"xenbackend bufs\n"

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return DATA_AT + self.blocks * self.block


@dataclass(frozen=True, slots=True)
class BackHeader(beside.MappedHeader):
    """The header of a file with tags. `size` is that of all slots; `base` identifies the layer below."""

    LAYER: ClassVar[str] = "cache"
    MAGIC: ClassVar[bytes] = b"xenbackend wrbk\n"
    ENTRY: ClassVar[int] = 8
