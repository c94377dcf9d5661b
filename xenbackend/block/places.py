"""An index of blocks that were found in a cache's file lately, for `HostFile.read_mapped`.

Must not be asked what the file has: a block that is not in here may be there all the same.
"""

from __future__ import annotations

from array import array

_LEAST = 1 << 16  # entries; blocks whose numbers differ by a multiple of their count share one
_NOWHERE = -1 << 62  # an entry for no block: it leads outside the slots, too


class Places:
    """Where blocks are in the file.

    bits    a block has 2**`bits` bytes
    start   where the slots begin in the file, in bytes
    stop    where they end
    shifts  by a block's number modulo their count: how many bytes further the block is in the file than on the disk

    Many blocks share an entry, and it has no block's number: it is for the one block that it takes into the slots. Any
    other block that shares it gets a place before `start` or from `stop` on, since there are no fewer entries than
    slots.
    """

    __slots__ = ("bits", "shifts", "start", "stop")

    def __init__(self, slots: int, bits: int, start: int) -> None:
        """Begin with no block. The `slots` follow one another from byte `start` on; each has 2**`bits` bytes."""
        self.bits, self.start, self.stop = bits, start, start + (slots << bits)
        self.shifts = array("q", [_NOWHERE]) * max(_LEAST, slots)

    def put(self, block: int, slot: int) -> None:
        """Enter that a slot has a block."""
        self.shifts[block % len(self.shifts)] = self.start + ((slot - block) << self.bits)

    def drop(self, block: int) -> None:
        """Remove the entry for a block, or for another one that shares it."""
        self.shifts[block % len(self.shifts)] = _NOWHERE

    def clear(self) -> None:
        """Remove all entries, in place."""
        nothing = array("q", [_NOWHERE]) * _LEAST
        for first in range(0, len(self.shifts), _LEAST):
            self.shifts[first : first + _LEAST] = nothing[: len(self.shifts) - first]

    def find(self, offset: int, length: int) -> int:
        """Return the byte in the file where these bytes of the disk are, or -1, also if they are of several blocks."""
        place = offset + self.shifts[(offset >> self.bits) % len(self.shifts)]
        is_one = offset >> self.bits == (offset + length - 1) >> self.bits
        return place if is_one and self.start <= place < self.stop else -1
