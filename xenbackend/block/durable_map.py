"""A map with a byte for each block of a disk, in memory that outlives the worker, and in a file as of the last flush.

Must not know what a byte means.
"""

from __future__ import annotations

from xenbackend.block.driver import Env, File
from xenbackend.block.durable_pages import PAGE, DurablePages
from xenbackend.errors import DriverError


class DurableMap(DurablePages):
    """The map. Anybody may read `states`; `mark` and `exchange` change it."""

    def __init__(self, env: Env, file: File, place: int, size: int, token: bytes, *, kinds: int = 3) -> None:
        """Take the map from memory or from the file, as `DurablePages` does. The states are 0 to `kinds` - 1.

        Raises: DriverError, if a byte is not one of them; OSError.
        """
        super().__init__(env, "map", file, place, size, token)
        self.states = self.bytes
        whole = self.states.tobytes()
        if odd := whole.translate(None, bytes(range(kinds))):
            raise _damaged(whole.index(odd[0]), odd[0], is_left=self.is_left)
        self.are_sound()
        self.counts = [whole.count(state) for state in range(kinds)]  # by state; 0 includes the padding

    def mark(self, block: int, state: int) -> None:
        """Set the state of a block, after all of its data were written to the file."""
        self.counts[self.states[block]] -= 1
        self.counts[state] += 1
        self.states[block] = state
        self.touch(block // PAGE)

    def exchange(self, first: int, last: int, former: int, state: int) -> None:
        """Set the state of all blocks from `first` to `last` that have the `former` state, as `mark` does."""
        table = bytes.maketrans(bytes([former]), bytes([state]))
        start = first
        while start <= last:
            stop = min(last + 1, (start // PAGE + 1) * PAGE)
            states = self.states[start:stop].tobytes()
            if count := states.count(former):
                self.states[start:stop] = states.translate(table)
                self.counts[former] -= count
                self.counts[state] += count
                self.touch(start // PAGE)
            start = stop


def _damaged(block: int, state: int, *, is_left: bool) -> DriverError:
    where = "its map in memory" if is_left else "its map"
    way_out = "detach the disk; attached again, it is as at the last flush" if is_left else "the file cannot be used"
    return DriverError(f"{where} is damaged: block {block} has state {state}, which does not exist; {way_out}")
