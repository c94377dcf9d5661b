"""Tells copies of blocks, which are on their way into a cache, from what was written to the disk meanwhile.

Must not hold anything up: whatever was overtaken is of no use, and that is all.
"""

from __future__ import annotations

from collections import Counter

_CHUNK = 4  # bits: blocks that are looked at together
_WIDE = 1 << 12  # blocks; what alters more than that alters everything


class Copy:
    """A copy of blocks from `first` to `last`; `is_old` once something else was being written there."""

    __slots__ = ("first", "is_old", "last")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.is_old = False


class Overtaken:
    """The copies and the writes of one layer that are under way."""

    def __init__(self) -> None:
        self._altering: Counter[int] = Counter()  # by chunk
        self._wide = 0
        self._copies: dict[int, list[Copy]] = {}  # by chunk

    @staticmethod
    def is_wide(first: int, last: int) -> bool:
        """Return whether these are too many blocks to look at each of them."""
        return last - first >= _WIDE

    def begin(self, first: int, last: int) -> None:
        """Take note that blocks are being altered: copies of them are old, from before or half of it."""
        if self.is_wide(first, last):
            self._wide += 1
            for copies in self._copies.values():
                for each in copies:
                    each.is_old = True
            return
        for chunk in range(first >> _CHUNK, (last >> _CHUNK) + 1):
            self._altering[chunk] += 1
            for each in self._copies.get(chunk, ()):
                each.is_old = True

    def end(self, first: int, last: int) -> None:
        """Take note that they were altered."""
        if self.is_wide(first, last):
            self._wide -= 1
            return
        for chunk in range(first >> _CHUNK, (last >> _CHUNK) + 1):
            self._altering[chunk] -= 1
            if not self._altering[chunk]:
                del self._altering[chunk]

    def copy(self, first: int, last: int) -> Copy:
        """Return a copy that is begun now, to be `forget`ed once it is where it belongs, or nowhere."""
        copy = Copy(first, last)
        chunks = range(first >> _CHUNK, (last >> _CHUNK) + 1)
        copy.is_old = bool(self._wide) or any(chunk in self._altering for chunk in chunks)
        for chunk in chunks:
            self._copies.setdefault(chunk, []).append(copy)
        return copy

    def forget(self, copy: Copy) -> None:
        """Look at a copy no more."""
        for chunk in range(copy.first >> _CHUNK, (copy.last >> _CHUNK) + 1):
            copies = self._copies[chunk]
            copies.remove(copy)
            if not copies:
                del self._copies[chunk]
