"""The map of a cache: which slot has which block of the disk, in memory that outlives the worker.

Must not know the content of a slot, nor have an entry for a block before all of it is in the slot.

A block can be in any of WAYS slots, those of its set. The entry of a slot is removed before the slot is written, and a
new one is made afterwards: so a kill leaves no entry for a slot with parts of two blocks. Entries are valid for one
file and one disk below, which the `token` identifies; with another token the map is empty.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from xenbackend.block.driver import Env
from xenbackend.block.places import Places
from xenbackend.units import PAGE

WAYS = 8
_TOKEN = 48  # bytes, at the beginning


class CacheMap:
    """The map of one cache. `take` never returns a slot with `pins`; each use of a slot adds a pin to it."""

    def __init__(self, env: Env, slots: int, token: bytes, *, block: int, data_at: int) -> None:
        """Take the map that a predecessor left, if it has the same `token`. There are `slots` // WAYS sets, at least 1.

        The slots follow one another in the file from byte `data_at` on, and have `block` bytes each.
        """
        self._sets = max(1, slots // WAYS)
        self.slots = self._sets * WAYS
        self._memory = env.memory("map", PAGE + 8 * self.slots)
        self._tags = self._memory[PAGE:].cast("Q")  # by slot: the block's number plus one, 0 for none
        self._used = bytearray(self.slots)  # by slot: 1 if it was used since the hand passed
        self._hands = bytearray(self._sets)  # by set: the way that is examined next for replacement
        self.pins = array("I", bytes(4 * self.slots))  # by slot: the number of its uses at the moment
        self.places = Places(self.slots, block.bit_length() - 1, data_at)  # of blocks that were found lately
        self._is_empty = False  # as far as we know: a predecessor may have left entries
        token = token.ljust(_TOKEN, b"\0")[:_TOKEN]
        if self._memory[:_TOKEN] != token:
            self.clear()
            self._memory[:_TOKEN] = token

    def find(self, block: int) -> int:
        """Return the slot that has a block, or -1 if none has."""
        first = block % self._sets * WAYS
        try:
            slot = first + self._tags[first : first + WAYS].tolist().index(block + 1)
        except ValueError:
            return -1
        self._used[slot] = 1
        self.places.put(block, slot)
        return slot

    def drop(self, first: int, last: int) -> None:
        """Remove the entries of these blocks."""
        tags, sets = self._tags, self._sets
        for block in range(first, last + 1):
            start = block % sets * WAYS
            row = tags[start : start + WAYS].tolist()
            if block + 1 in row:
                tags[start + row.index(block + 1)] = 0
                self.places.drop(block)

    def clear(self) -> None:
        """Remove all entries. This costs nothing if there are none since the last time."""
        if self._is_empty:
            return
        self._is_empty = True
        self.places.clear()  # which has only blocks that are in the map
        step = 1 << 20
        for start in range(PAGE, len(self._memory), step):
            part = self._memory[start : start + step]
            part[:] = bytes(len(part))

    def take(self, block: int) -> int:
        """Return a slot for a block, pinned and without an entry; -1 if all slots of its set are pinned."""
        number = block % self._sets
        first = number * WAYS
        free = [slot for slot in range(first, first + WAYS) if not self.pins[slot]]
        if not free:
            return -1
        slot = next((each for each in free if not self._tags[each]), -1)
        if slot < 0:
            slot = self._replace(number, free)
        self._give(slot, 0)
        self.pins[slot] += 1
        return slot

    def _replace(self, number: int, free: Sequence[int]) -> int:
        """Return the next slot of a set that was not used since the hand passed (CLOCK, or second chance)."""
        hand = self._hands[number]
        while True:
            slot = number * WAYS + hand
            hand = (hand + 1) % WAYS
            if slot in free and not self._used[slot]:
                self._hands[number] = hand
                return slot
            self._used[slot] = 0
            self.places.drop(self._tags[slot] - 1)  # so that its next use calls `find`

    def put(self, slot: int, block: int) -> None:
        """Enter that a slot returned by `take` has a block, unless another slot has got it meanwhile."""
        if self.find(block) < 0:
            self._give(slot, block + 1)
            self._used[slot] = 0  # blocks used only once are replaced first, so that a backup does not empty the cache

    def restore(self, slot: int, block: int) -> None:
        """Enter that a slot has a block, in place of any other slot."""
        self.drop(block, block)
        self._give(slot, block + 1)

    def _give(self, slot: int, tag: int) -> None:
        if tag:
            self._is_empty = False
        self.places.drop(self._tags[slot] - 1)
        self._tags[slot] = tag

    def close(self) -> None:
        """Release the memory."""
        self._tags.release()
        self._memory.release()
