"""A byte for each block of a disk, in memory that outlives the worker, and in a file as of the last flush.

Must not know what a byte means, nor put one into the file before what it tells of is durable there:

    flush    the file's data are made durable -> pages of the map as they were before that -> made durable, too

So what the file has after a power failure is an earlier map, of blocks that are all there.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.block.driver import Env, File
from xenbackend.block.mapped.parts import Part, Pool, allocate, tell
from xenbackend.block.request import Op
from xenbackend.errors import DriverError

PAGE = 4096  # bytes that are written together
_PIECE = 1 << 20  # bytes that are read at once, while it is opened
TOKEN = 16  # bytes behind the map in memory: of which file it is, once it was read
Done = Callable[[int], None]  # gets 0 or a positive errno


class DurableMap:
    """The map; `states` may be read at will, and is written by `mark`."""

    def __init__(self, env: Env, file: File, place: int, size: int, token: bytes, *, kinds: int = 3) -> None:
        """Take what a predecessor left of this file in memory, else what the file has at `place`.

        `size` is in bytes, whole pages; at `place` the file has as many. No other file has this `token`. There are so
        many `kinds` of states, from 0 on. Raises: DriverError, where a byte is none of them; OSError.
        """
        self._memory = env.memory("map", size + PAGE)
        self.states = self._memory[:size]
        self._file, self._place = file, place
        self._pool = Pool()
        self._dirty: set[int] = set()  # pages that the file does not have as they are
        self._waiting: list[Done] = []  # for the next round
        self._is_flushing = False
        is_left = self._memory[size : size + TOKEN] == token
        for start in range(0, size, _PIECE):
            found = file.read_at(place + start, min(_PIECE, size - start))
            if not is_left:
                self.states[start : start + len(found)] = found
            elif self.states[start : start + len(found)] != found:
                pages = range(start, start + len(found), PAGE)
                self._dirty.update(
                    at // PAGE for at in pages if self.states[at : at + PAGE] != found[at - start : at - start + PAGE]
                )
        whole = self.states.tobytes()
        if odd := whole.translate(None, bytes(range(kinds))):
            raise _damaged(whole.index(odd[0]), odd[0], is_left=is_left)
        self._memory[size : size + TOKEN] = token
        self.counts = [whole.count(state) for state in range(kinds)]  # by state; 0: and what is behind the last block

    def mark(self, block: int, state: int) -> None:
        """Note the state of a block, of which everything has been given to the file."""
        self.counts[self.states[block]] -= 1
        self.counts[state] += 1
        self.states[block] = state
        self._dirty.add(block // PAGE)

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
                self._dirty.add(start // PAGE)
            start = stop

    def flush(self, done: Done) -> None:
        """Make durable what was given to the file, and marked, before; `done` hears how that ended."""
        self._waiting.append(done)
        if not self._is_flushing:
            self._begin()

    def _begin(self) -> None:
        self._is_flushing = True
        waiting, self._waiting = self._waiting, []
        pages = {page: self.states[page * PAGE : (page + 1) * PAGE].tobytes() for page in self._dirty}
        self._dirty.clear()
        self._sync(lambda status: self._write(status, pages, waiting))

    def _sync(self, done: Done) -> None:
        self._file.submit([self._pool.take(Op.FLUSH, 0, 0, (), tell, done)])

    def _write(self, status: int, pages: dict[int, bytes], waiting: list[Done]) -> None:
        """Write pages of the map, and make them durable."""
        if status or not pages:
            self._end(status, pages if status else {}, waiting)
            return
        left, statuses = len(pages), []

        def written(status: int) -> None:
            statuses.append(status)
            if len(statuses) < left:
                return
            failed = max(statuses)
            if failed:
                self._end(failed, pages, waiting)
            else:
                self._sync(lambda status: self._end(status, pages if status else {}, waiting))

        parts = []
        for page, data in pages.items():
            memory = allocate(PAGE)
            memory[:] = data
            parts.append(self._pool.take(Op.WRITE, self._place + page * PAGE, PAGE, [memory], tell, written))
        self._file.submit(parts)  # type: ignore[arg-type]  # each is a request

    def _end(self, status: int, unwritten: dict[int, bytes], waiting: list[Done]) -> None:
        self._dirty.update(unwritten)
        self._is_flushing = False
        if self._waiting:
            self._begin()
        for done in waiting:
            done(status)

    def take(self, part: Part) -> None:
        """Take back a part of ours that the file has given back."""
        part.done(part)
        self._pool.put(part)

    def owns(self, part: Part) -> bool:
        """Return whether a part is ours."""
        return part.pool is self._pool

    def close(self, *, writes: bool) -> None:
        """Let go of the memory; if it `writes`, bring everything into the file before. Raises: OSError."""
        try:
            if writes and self._dirty:
                self._file.sync()
                for start in (page * PAGE for page in sorted(self._dirty)):
                    self._file.write_at(self._place + start, self.states[start : start + PAGE].tobytes())
                self._file.sync()
        finally:
            self.states.release()
            self._memory.release()


def _damaged(block: int, state: int, *, is_left: bool) -> DriverError:
    problem = f"its map is damaged: block {block} has state {state}, and there is none"
    way_out = "detach the disk, and it begins as its file was at the last flush" if is_left else "the file is of no use"
    return DriverError(f"{problem}{' as a worker left it in memory' if is_left else ''}; {way_out}")
