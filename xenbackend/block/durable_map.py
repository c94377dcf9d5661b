"""A byte for each block of a disk, in memory that outlives the worker, and in a file as of the last flush.

Must not know what a byte means.
"""

from __future__ import annotations

from xenbackend.block.driver import Env, File
from xenbackend.block.durable_pages import PAGE, DurablePages
from xenbackend.errors import DriverError


class DurableMap(DurablePages):
    """The map; `states` may be read at will, and is written by `mark`."""

    def __init__(self, env: Env, file: File, place: int, size: int, token: bytes, *, kinds: int = 3) -> None:
        """Take it as `DurablePages` does. There are so many `kinds` of states, from 0 on.

        Raises: DriverError, where a byte is none of them; OSError.
        """
        super().__init__(env, "map", file, place, size, token)
        self.states = self.bytes
        whole = self.states.tobytes()
        if odd := whole.translate(None, bytes(range(kinds))):
            raise _damaged(whole.index(odd[0]), odd[0], is_left=self.is_left)
        self.are_sound()
        self.counts = [whole.count(state) for state in range(kinds)]  # by state; 0: and what is behind the last block

    def mark(self, block: int, state: int) -> None:
        """Note the state of a block, of which everything has been given to the file."""
        self.counts[self.states[block]] -= 1
        self.counts[state] += 1
        self.states[block] = state
        self.touch(block // PAGE)

    def exchange(self, first: int, last: int, former: int, state: int) -> None:
        """Do as `mark` for all blocks from `first` to `last` that have the `former` state."""
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
    problem = f"its map is damaged: block {block} has state {state}, and there is none"
    way_out = (
        "detach the disk, and it begins as its file was at the last flush" if is_left else "the file cannot be used"
    )
    return DriverError(f"{problem}{' as a worker left it in memory' if is_left else ''}; {way_out}")
