"""The file of `cow:`: bytes to values.

    0           header (`beside`)
    4096        map: one byte for each block of the disk
    data_at     the blocks: block n at data_at + n * block; blocks that are not in the file are holes

A byte of the map is BASE (the block is in the layer below), OWN (it is in this file) or ZEROS. It never becomes BASE
again, and is written only after its block is durable. So if only some writes to the map have reached the medium, each
block is as it was at the last flush, or newer. The format is ours. Must not open a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xenbackend.block.formats import beside

BASE, OWN, ZEROS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Header(beside.MappedHeader):
    """See the head of this file."""

    LAYER: ClassVar[str] = "cow"
    MAGIC: ClassVar[bytes] = b"xenbackend cow\r\n"
    ENTRY: ClassVar[int] = 1
