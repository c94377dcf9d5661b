"""Detects copies of blocks on their way into a cache that are outdated because the blocks were altered meanwhile.

Must not delay anything: an outdated copy is merely not stored.
"""

from __future__ import annotations

from collections import Counter

_CHUNK = 4  # log2 of the number of blocks that are tracked together
_WIDE = 1 << 12  # blocks; a request that alters more counts as altering everything


class Copy:
    """A copy of blocks `first` to `last`; `is_old` is set as soon as they are altered."""

    __slots__ = ("first", "is_old", "last")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.is_old = False


class Overtaken:
    """The copies, and the requests that alter blocks, that are under way in one layer."""

    def __init__(self) -> None:
        self._altering: Counter[int] = Counter()  # by chunk
        self._wide = 0
        self._copies: dict[int, list[Copy]] = {}  # by chunk

    @staticmethod
    def is_wide(first: int, last: int) -> bool:
        """Return whether these are too many blocks to track each of them."""
        return last - first >= _WIDE

    def begin(self, first: int, last: int) -> None:
        """Note that blocks are being altered: copies of them may have old data or a mixture, and are marked as old."""
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
        """Note that the request for which `begin` was called has ended."""
        if self.is_wide(first, last):
            self._wide -= 1
            return
        for chunk in range(first >> _CHUNK, (last >> _CHUNK) + 1):
            self._altering[chunk] -= 1
            if not self._altering[chunk]:
                del self._altering[chunk]

    def copy(self, first: int, last: int) -> Copy:
        """Return a new copy; call `forget` with it when it has been stored, or dropped."""
        copy = Copy(first, last)
        chunks = range(first >> _CHUNK, (last >> _CHUNK) + 1)
        copy.is_old = bool(self._wide) or any(chunk in self._altering for chunk in chunks)
        for chunk in chunks:
            self._copies.setdefault(chunk, []).append(copy)
        return copy

    def forget(self, copy: Copy) -> None:
        """Stop tracking a copy."""
        for chunk in range(copy.first >> _CHUNK, (copy.last >> _CHUNK) + 1):
            copies = self._copies[chunk]
            copies.remove(copy)
            if not copies:
                del self._copies[chunk]
