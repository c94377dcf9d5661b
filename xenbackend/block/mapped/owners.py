"""Which of a disk's parents holds what, remembered, so that a read goes there at once and not down the chain.

Must not send anything, nor be asked about what the disk has itself. It holds because parents are never written while
they are open: what a parent once had, it has.
"""

from __future__ import annotations

from xenbackend.block.driver import Driver
from xenbackend.block.request import Request

_MOST = 16 << 20  # bytes of a memo
_EXTRA = 128  # bytes that a table takes beside its numbers
_MAX_OWNERS = 255

Gathered = list[tuple[Driver | None, list[Request]]]


class Owners:
    """Gathers reads by the layer that they go to: `gathered` has a list for each number of an owner.

    The number 0 is for reads of what is not known to be anybody's. `gathered` stays the same object, for whoever
    cannot afford a call.
    """

    def __init__(self) -> None:
        self.gathered: list[list[Request]] = [[]]
        self._owners: list[Driver] = []

    def number(self, owner: Driver) -> int:
        """Return the number of an owner, which is its for good."""
        if owner not in self._owners:
            if len(self._owners) == _MAX_OWNERS:
                return 0
            self._owners.append(owner)
            self.gathered.append([])
        return self._owners.index(owner) + 1

    def take(self) -> Gathered:
        """Return what was gathered, by owner; None for what is not known to be anybody's."""
        taken: Gathered = []
        for number, requests in enumerate(self.gathered):
            if requests:
                taken.append((self._owners[number - 1] if number else None, requests[:]))
                requests.clear()
        return taken


class Memo:
    """The owner's number of each cluster of a table, in `known`, a byte for each; what is not known is 0.

    Args:
        entries: clusters of a table.
    """

    def __init__(self, entries: int) -> None:
        self.known: dict[int, bytearray] = {}  # stays the same object
        self._entries = entries
        self._limit = max(1, _MOST // (entries + _EXTRA))

    def remember(self, table: int, index: int, number: int) -> None:
        """Keep a number; when there are too many tables, all are forgotten."""
        if table not in self.known:
            if len(self.known) >= self._limit:
                self.known.clear()
            self.known[table] = bytearray(self._entries)
        self.known[table][index] = number
