"""What the formats that are only read have in common: where the tables are that say where the disk is.

Must not open a file. Numbers of such a format are little endian.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from xenbackend.block.formats.common import damaged
from xenbackend.block.mapped.tables import PLACE

MIN_CLUSTER_BITS = 9  # bytes of a place in the file begin a sector


@dataclass(frozen=True, slots=True)
class Shape:
    """The disk, and how its tables divide it: entries stand for clusters, and a table has so many."""

    size: int  # bytes
    cluster_bits: int
    table_bits: int
    file_size: int  # bytes
    sector_size: int = 512
    physical_sector_size: int = 0  # that of the disk's medium, where the image says it

    @property
    def tables(self) -> int:
        """How many tables there are."""
        return -(-self.size >> (self.cluster_bits + self.table_bits))


class Layout(Protocol):
    """What a format says of an image: its shape, and its tables one by one."""

    @property
    def shape(self) -> Shape:
        """Return the disk, and how its tables divide it."""

    def table_at(self, number: int) -> tuple[int, int]:
        """Return where a table is in the file, in bytes, and its length; the length 0 where there is none."""

    def decode(self, data: bytes) -> array[int]:
        """Return the entries of a table, as `block.mapped.tables` has them. Raises: DriverError."""


def power_of(number: int) -> int:
    """Return n where `number` is 2 to the power of n, else -1."""
    return number.bit_length() - 1 if number > 0 and not number & number - 1 else -1


def check_places(entries: Iterable[int], file_size: int) -> None:
    """Refuse a table with a cluster that begins where the file has ended. Raises: DriverError."""
    last = max((entry & PLACE for entry in entries), default=0)
    if last >= max(1, file_size):
        raise damaged(f"a cluster is at byte {last}, and the file has {file_size}")
