"""What the read-only formats have in common: where the tables are that place a disk's clusters.

Must not open a file. Their numbers are little-endian.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from xenbackend.block.formats.common import damaged
from xenbackend.block.mapped.tables import PLACE

MIN_CLUSTER_BITS = 9  # clusters begin at a sector of the file


@dataclass(frozen=True, slots=True)
class Shape:
    """The disk, and how its tables divide it: each entry is for a cluster, and a table has 2**table_bits entries."""

    size: int  # bytes
    cluster_bits: int
    table_bits: int
    file_size: int  # bytes
    sector_size: int = 512
    physical_sector_size: int = 0  # that of the disk's medium, if the image says it, else 0

    @property
    def tables(self) -> int:
        """The number of tables."""
        return -(-self.size >> (self.cluster_bits + self.table_bits))


class Layout(Protocol):
    """The layout of an image: its shape, and its tables one by one."""

    @property
    def shape(self) -> Shape:
        """The disk, and how its tables divide it."""

    def table_at(self, number: int) -> tuple[int, int]:
        """Return where a table is in the file and its length, in bytes; the length is 0 if there is no such table."""

    def decode(self, data: bytes) -> array[int]:
        """Return the entries of a table, as in `block.mapped.tables`. Raises: DriverError."""


def power_of(number: int) -> int:
    """Return n if `number` is 2 to the power of n, else -1."""
    return number.bit_length() - 1 if number > 0 and not number & number - 1 else -1


def check_places(entries: Iterable[int], file_size: int) -> None:
    """Refuse a table with a cluster that begins at or beyond the end of the file. Raises: DriverError."""
    last = max((entry & PLACE for entry in entries), default=0)
    if last >= max(1, file_size):
        raise damaged(f"a cluster is at byte {last}, but the file has only {file_size} bytes")
