"""The places of a disk's clusters: entries, and a bounded cache of the tables that hold them.

Must not do I/O, nor know how a format writes its tables.

An entry is one number for each cluster, a place in the file and flags: ``place | READABLE | WRITABLE``. A place is in
bytes and a multiple of 512, so there is room for the flags. Entry 0 is a cluster that the image does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Generic, TypeVar

READABLE = 1 << 0  # reads may go to the place: 1 << Op.READ
WRITABLE = 1 << 1  # writes may go to the place without any change of metadata: 1 << Op.WRITE
ZERO = 1 << 4  # reads as zeros, whatever the parent has. Bits 2 and 3 stay clear: flushes and discards have no place
SPECIAL = 1 << 5  # only the format can read and write it; the other bits are its own
OWNED = READABLE | WRITABLE
PLACE = (1 << 63) - 512  # the bits of an entry that are the place

Table = Sequence[int]
T = TypeVar("T")


class Tables(Generic[T]):
    """A cache of tables by number: the last used ones, `limit` to twice as many, and those that are pinned.

    There are two generations, so that a hit costs one look into `young`, and nothing is moved on each use. When there
    are `limit` young ones, they become the old ones, and the old ones that were not used again are dropped.

    Args:
        limit: number of tables; the cache takes up to twice the memory of so many.
    """

    def __init__(self, limit: int) -> None:
        self.young: dict[int, T] = {}  # stays the same object, so that a hot loop can use it without a call
        self._old: dict[int, T] = {}
        self._limit = max(1, limit)
        self._pins: Counter[int] = Counter()

    def find(self, number: int) -> T | None:
        """Return a table, or None if it has to be loaded."""
        table = self.young.get(number)
        if table is None:
            table = self._old.pop(number, None)
            if table is not None:
                self.put(number, table)
        return table

    def put(self, number: int, table: T) -> None:
        """Add a table; if this makes the young ones old, old ones that are not pinned are dropped."""
        if len(self.young) >= self._limit and number not in self.young:
            self._grow_old()
        self._old.pop(number, None)
        self.young[number] = table

    def pin(self, number: int) -> None:
        """Keep a table until it is unpinned as often: a change of it is on its way to the file."""
        self._pins[number] += 1

    def unpin(self, number: int) -> None:
        """Undo one `pin`."""
        self._pins[number] -= 1
        if not self._pins[number]:
            del self._pins[number]

    def drop(self, number: int) -> None:
        """Forget a table, pinned or not."""
        self.young.pop(number, None)
        self._old.pop(number, None)

    def __len__(self) -> int:
        return len(self.young) + len(self._old)

    def _grow_old(self) -> None:
        kept = {number: table for number, table in self._old.items() if number in self._pins}
        self._old = self.young.copy() | kept
        self.young.clear()
