"""The tags of a write-back cache: which dirty block each slot has, in memory that outlives the worker, and in FILE.

Must not write a tag to FILE before the data in the slot are durable there (`durable_pages`).

A slot is free only when the removal of its tag is durable in FILE. If the slot were reused before, a power failure
could bring back the tag of the old block, with other data in the slot.
"""

from __future__ import annotations

from collections.abc import Iterator

from xenbackend.block.driver import Env, File
from xenbackend.block.durable_pages import Done, DurablePages
from xenbackend.errors import DriverError
from xenbackend.units import PAGE

_EACH = PAGE // 8
_NONE = bytes(PAGE)


class DurableTags:
    """The tags of one FILE. A slot's tag is the number of its block plus one, or 0 for none."""

    def __init__(self, env: Env, file: File, place: int, size: int, token: bytes) -> None:
        """Take the tags as `DurablePages` does; write those from memory to FILE, unless read-only. Raises: OSError."""
        self.pages = DurablePages(env, "tags", file, place, size, token)
        self.pages.are_sound()  # `check` examines them after each opening
        self._tags = self.pages.bytes.cast("Q")
        if self.pages.is_left and not env.read_only:
            self.pages.write_out()
            file.sync()  # even if nothing differed: the page cache may have what the medium does not

    def tagged(self) -> Iterator[tuple[int, int]]:
        """Yield each slot that has a tag, with its block."""
        for first in range(0, len(self._tags), _EACH):  # most pages of a large cache have no tags
            if self.pages.bytes[8 * first : 8 * (first + _EACH)].tobytes() != _NONE:
                page = self._tags[first : first + _EACH].tolist()
                yield from ((slot, tag - 1) for slot, tag in enumerate(page, first) if tag)

    def check(self, ways: int, sets: int, blocks: int, most: int) -> None:
        """Check that each tag's block is on the disk, in a slot of its set, and in no other slot.

        Args:
            ways: slots in a set.
            sets: sets in the cache.
            blocks: blocks of the disk.
            most: tags that there may be.

        Raises: DriverError.
        """
        seen = set[int]()
        for slot, block in self.tagged():
            if block >= blocks or block % sets != slot // ways or block in seen:
                raise DriverError(f"its map is damaged, or the disk below has shrunk: slot {slot} has block {block}")
            seen.add(block)
            if len(seen) > most:  # each of them takes memory
                raise DriverError(f"its map is damaged: more than {most} blocks are marked as dirty")

    def put(self, slot: int, block: int) -> None:
        """Note that a slot has the only copy of a block, after all of it was written to FILE."""
        self._tags[slot] = block + 1
        self.pages.touch(slot // _EACH)

    def drop(self, slot: int) -> None:
        """Remove a slot's tag: the layer below has the block durably, or it was discarded."""
        self._tags[slot] = 0
        self.pages.touch(slot // _EACH)

    def flush(self, done: Done) -> None:
        """See `DurablePages.flush`."""
        self.pages.flush(done)

    def close(self, *, writes: bool) -> None:
        """See `DurablePages.close`."""
        self._tags.release()
        self.pages.close(writes=writes)
