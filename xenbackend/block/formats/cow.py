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

BASE, OWN, ZEROS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Header(beside.MappedHeader):
    """See the head of this file."""

    LAYER: ClassVar[str] = "cow"
    MAGIC: ClassVar[bytes] = b"xenbackend cow\r\n"
    ENTRY: ClassVar[int] = 1
