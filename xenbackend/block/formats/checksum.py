"""The file of `checksum:`: bytes to values.

    0         header (`beside`)
    4096      log: one byte for each PAGE of sums, not 0 while that page's sums may not match the data on the medium
    sums_at   sums: 32 bits for each block, 0 if the sum is not known

A sum is the CRC-32 of a block with the block's number as its initial value, so that a block in the place of another one
is detected. A known sum is never 0. Everything is little-endian. The format is ours. Must not open a file.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

from xenbackend.block.formats import beside
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.units import round_up

PAGE = 4096  # bytes of the file that are written together
SUMS = PAGE // 4  # sums in a page


@dataclass(frozen=True, slots=True)
class Header(beside.Header):
    """See the head of this file."""

    LAYER: ClassVar[str] = "checksum"
    MAGIC: ClassVar[bytes] = b"xenbackend sums\n"

    @property
    def pages(self) -> int:
        """The number of pages of sums."""
        return -(-self.blocks // SUMS)

    @property
    def log_size(self) -> int:
        """The log's size in bytes, whole pages."""
        return round_up(self.pages, PAGE)

    @property
    def sums_at(self) -> int:
        """The place of block 0's sum, in bytes."""
        return HEADER_SIZE + self.log_size

    @property
    def file_size(self) -> int:
        """The file's size in bytes."""
        return self.sums_at + self.pages * PAGE


def sum_of(data: memoryview | bytes, block: int) -> int:
    """Return the sum of a block's bytes; `block` is its number."""
    return zlib.crc32(data, block & 0xFFFFFFFF) or 1
