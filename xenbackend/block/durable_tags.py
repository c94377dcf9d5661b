"""Which slot of a write-back cache has a block that is nowhere else: in memory that outlives the worker, and in FILE.

Must not put a tag into FILE before the data that it tells of are durable there (`durable_pages`).

A slot whose tag was taken away is `free` once FILE knows that durably, too: until then a power failure would bring the
tag back, and with it whatever the slot has by then.
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
    """The tags of one FILE: by slot the block's number and one more, 0 for none."""

    def __init__(self, env: Env, file: File, place: int, size: int, token: bytes) -> None:
        """Take them as `DurablePages` does. FILE has them as memory has afterwards. Raises: OSError."""
        self.pages = DurablePages(env, "tags", file, place, size, token)
        self.pages.are_sound()  # as `check` finds them, or not
        self._tags = self.pages.bytes.cast("Q")
        if self.pages.is_left and not env.read_only:
            self.pages.write_out()
            file.sync()  # FILE may seem to know what its medium does not

    def tagged(self) -> Iterator[tuple[int, int]]:
        """Yield each slot that has a tag, with its block."""
        for first in range(0, len(self._tags), _EACH):  # of a large cache nearly all have none
            if self.pages.bytes[8 * first : 8 * (first + _EACH)].tobytes() != _NONE:
                page = self._tags[first : first + _EACH].tolist()
                yield from ((slot, tag - 1) for slot, tag in enumerate(page, first) if tag)

    def check(self, ways: int, sets: int, blocks: int, most: int) -> None:
        """See that each tag can be: its block is one of the disk's, in its set and in no other slot; `most` have one.

        Raises: DriverError.
        """
        seen = set[int]()
        for slot, block in self.tagged():
            if block >= blocks or block % sets != slot // ways or block in seen:
                raise DriverError(f"its map is damaged, or the disk below has shrunk: slot {slot} has block {block}")
            seen.add(block)
            if len(seen) > most:  # each takes memory
                raise DriverError(f"its map is damaged: more than {most} blocks are in it alone")

    def put(self, slot: int, block: int) -> None:
        """Note that only this slot has a block, all of which was given to FILE."""
        self._tags[slot] = block + 1
        self.pages.touch(slot // _EACH)

    def drop(self, slot: int) -> None:
        """Note that the layer below has durably what a slot has, or that it is of no use."""
        self._tags[slot] = 0
        self.pages.touch(slot // _EACH)

    def flush(self, done: Done) -> None:
        """See `DurablePages.flush`."""
        self.pages.flush(done)

    def close(self, *, writes: bool) -> None:
        """See `DurablePages.close`."""
        self._tags.release()
        self.pages.close(writes=writes)
