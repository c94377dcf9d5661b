"""Which slot of a cache has which block of a disk, in memory that outlives the worker.

Must not know what is in a slot, nor say that a block is there before all of it is.

A block may be in WAYS slots, those of its set. A slot is taken from the map before it is written, and put in when that
is done: whoever is killed leaves no entry of a slot that is half one block and half another. Entries are of one file
and one disk below, which have a `token`; with another one there are none.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from xenbackend.block.driver import Env
from xenbackend.units import PAGE

WAYS = 8
_TOKEN = 48  # bytes, at the beginning
_MOST_PLACES = 1 << 16  # of 130 bytes each


class CacheMap:
    """The map of one cache. A slot with `pins` is not given to another block; whoever uses a slot has one there."""

    def __init__(self, env: Env, slots: int, token: bytes, *, block: int, data_at: int) -> None:
        """Take what a predecessor left, if it is of the same `token`; there are at least `slots` // WAYS sets.

        The slots lie one behind the other in the file, of `block` bytes each, from `data_at` on.
        """
        self._block, self._data_at = block, data_at
        self._sets = max(1, slots // WAYS)
        self.slots = self._sets * WAYS
        self._memory = env.memory("map", PAGE + 8 * self.slots)
        self._tags = self._memory[PAGE:].cast("Q")  # by slot: the block's number and one more, 0 for none
        self._used = bytearray(self.slots)  # by slot: since the hand came by
        self._hands = bytearray(self._sets)  # by set: the way that is looked at next when one has to go
        self.pins = array("I", bytes(4 * self.slots))  # by slot: what reads or writes it now
        self.places: dict[int, int] = {}  # by block: where it is in the file, of most that are found again and again
        token = token.ljust(_TOKEN, b"\0")[:_TOKEN]
        if self._memory[:_TOKEN] != token:
            self.clear()
            self._memory[:_TOKEN] = token

    def find(self, block: int) -> int:
        """Return the slot that has a block; -1: none does."""
        first = block % self._sets * WAYS
        try:
            slot = first + self._tags[first : first + WAYS].tolist().index(block + 1)
        except ValueError:
            return -1
        self._used[slot] = 1
        if len(self.places) >= _MOST_PLACES:
            self.places.clear()
        self.places[block] = self._data_at + slot * self._block
        return slot

    def drop(self, first: int, last: int) -> None:
        """Take note that no slot has any of these blocks."""
        tags, sets = self._tags, self._sets
        for block in range(first, last + 1):
            start = block % sets * WAYS
            row = tags[start : start + WAYS].tolist()
            if block + 1 in row:
                tags[start + row.index(block + 1)] = 0
                self.places.pop(block, None)

    def clear(self) -> None:
        """Take note that no slot has anything."""
        self.places.clear()
        step = 1 << 20
        for start in range(PAGE, len(self._memory), step):
            part = self._memory[start : start + step]
            part[:] = bytes(len(part))

    def take(self, block: int) -> int:
        """Return a slot for a block, pinned, which has nothing any more; -1: all of its set are pinned."""
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
        """Return the next slot of a set that was not used since the last round (CLOCK, or second chance)."""
        hand = self._hands[number]
        while True:
            slot = number * WAYS + hand
            hand = (hand + 1) % WAYS
            if slot in free and not self._used[slot]:
                self._hands[number] = hand
                return slot
            self._used[slot] = 0
            self.places.pop(self._tags[slot] - 1, None)  # or nobody would see that it is used again

    def put(self, slot: int, block: int) -> None:
        """Take note that a slot which was taken has a block, unless another one has it meanwhile."""
        if self.find(block) < 0:
            self._give(slot, block + 1)
            self._used[slot] = 0  # what is read once goes first, or a backup would empty the cache

    def restore(self, slot: int, block: int) -> None:
        """Take note that a slot has a block, and no other one."""
        self.drop(block, block)
        self._give(slot, block + 1)

    def _give(self, slot: int, tag: int) -> None:
        self.places.pop(self._tags[slot] - 1, None)
        self._tags[slot] = tag

    def close(self) -> None:
        """Let go of the memory."""
        self._tags.release()
        self._memory.release()
