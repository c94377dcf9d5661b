"""Remembers which of a disk's parents has which data, so that a read goes there directly and not down the chain.

Must not send anything, nor be used for data that the disk has itself. What is remembered stays true, because parents
are never written to while they are open.
"""

from __future__ import annotations

from xenbackend.block.driver import Driver
from xenbackend.block.request import Request

_MOST = 16 << 20  # bytes of a memo
_EXTRA = 128  # bytes that a table takes in addition to its numbers
_MAX_OWNERS = 255

Gathered = list[tuple[Driver | None, list[Request]]]


class Owners:
    """Gathers reads by the layer that they go to: `gathered` has a list for each owner's number.

    Number 0 is for reads whose owner is not known. `gathered` stays the same object, so that a hot loop can use it
    without a call.
    """

    def __init__(self) -> None:
        self.gathered: list[list[Request]] = [[]]
        self._owners: list[Driver] = []

    def number(self, owner: Driver) -> int:
        """Return an owner's number, which never changes; 0 if there are too many owners."""
        if owner not in self._owners:
            if len(self._owners) == _MAX_OWNERS:
                return 0
            self._owners.append(owner)
            self.gathered.append([])
        return self._owners.index(owner) + 1

    def take(self) -> Gathered:
        """Return the gathered reads by owner, and empty the lists; the owner is None if it is not known."""
        taken: Gathered = []
        for number, requests in enumerate(self.gathered):
            if requests:
                taken.append((self._owners[number - 1] if number else None, requests[:]))
                requests.clear()
        return taken


class Memo:
    """By table in `known`: the owner's number of each of its clusters, one byte each, 0 if it is not known.

    Args:
        entries: clusters in a table.
    """

    def __init__(self, entries: int) -> None:
        self.known: dict[int, bytearray] = {}  # stays the same object
        self._entries = entries
        self._limit = max(1, _MOST // (entries + _EXTRA))

    def remember(self, table: int, index: int, number: int) -> None:
        """Remember a number; if there are too many tables, first forget all of them."""
        if table not in self.known:
            if len(self.known) >= self._limit:
                self.known.clear()
            self.known[table] = bytearray(self._entries)
        self.known[table][index] = number
