"""Holds on blocks that a request alters: other requests that alter them have to wait for their turn.

Must not begin a waiting request; the caller does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xenbackend.block.request import Op, Request


@dataclass(eq=False, slots=True)
class Hold:
    """The blocks that one request alters, and the requests that wait for them."""

    first: int
    last: int
    waiting: list[Request] = field(default_factory=list)


class Holds:
    """The holds of one layer. A discard may have any number of blocks, and has one entry; a write has one for each."""

    def __init__(self) -> None:
        self._blocks: dict[int, Hold] = {}
        self._wide: list[Hold] = []

    def find(self, first: int, last: int) -> Hold | None:
        """Return a hold on any of these blocks, or None."""
        for wide in self._wide:
            if wide.first <= last and first <= wide.last:
                return wide
        blocks = self._blocks
        if first == last or not blocks:
            return blocks.get(first)
        if last - first < len(blocks):
            return next((blocks[block] for block in range(first, last + 1) if block in blocks), None)
        return next((hold for block, hold in blocks.items() if first <= block <= last), None)

    def add(self, op: int, first: int, last: int) -> None:
        """Hold blocks for a write or a discard; none of them is held yet."""
        hold = Hold(first, last)
        if op == Op.DISCARD:
            self._wide.append(hold)
        elif first == last:
            self._blocks[first] = hold
        else:
            self._blocks.update(dict.fromkeys(range(first, last + 1), hold))

    def remove(self, op: int, first: int, last: int) -> list[Request]:
        """Remove the hold of an `add` with the same arguments, and return the requests that waited for it."""
        if op == Op.DISCARD:
            hold = next(each for each in self._wide if (each.first, each.last) == (first, last))
            self._wide.remove(hold)
        else:
            hold = self._blocks[first]
            for block in range(first, last + 1):
                del self._blocks[block]
        return hold.waiting
