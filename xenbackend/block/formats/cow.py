"""The file of `cow:`: bytes to values.

    0           header (`beside`)
    4096        map: one byte for each block of the disk
    data_at     the blocks, each at its place: block n at data_at + n * block; those that are not here are holes

A byte of the map is BASE (what the layer below has), OWN (the block is here) or ZEROS. It never becomes BASE again, and
no block that is OWN or ZEROS was BASE alone before, so a map of which only some writes have reached the medium is an
earlier map. The format is ours. Must not open a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xenbackend.block.formats import beside
from xenbackend.block.formats.beside import HEADER_SIZE, MAX_BLOCK
from xenbackend.units import round_up

BASE, OWN, ZEROS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Header(beside.Header):
    """See the head of this file."""

    LAYER: ClassVar[str] = "cow"
    MAGIC: ClassVar[bytes] = b"xenbackend cow\r\n"

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
