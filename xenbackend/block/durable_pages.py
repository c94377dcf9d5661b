"""Pages of metadata of a filter's file, in memory that outlives the worker, and in the file as of the last flush.

Must not know what is in them, nor write one to the file before the data that it describes are durable there:

    flush    data in the file made durable -> pages, as they were before that, written and made durable, too

So after a power failure the file may have earlier pages, but all the data that they describe.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from xenbackend.block.driver import Env, File
from xenbackend.block.mapped.parts import Part, Pool, allocate, tell
from xenbackend.block.request import Op, Request

PAGE = 4096  # bytes; the unit of writing
_TOGETHER = 256  # pages that share one buffer for writing, at most
_PIECE = 1 << 20  # bytes that `__init__` reads at a time
TOKEN = 16  # bytes after the pages in memory: the token of the file from which they were read
Done = Callable[[int], None]  # gets 0 or a positive errno


class DurablePages:
    """The pages. The owner reads and writes `bytes`, and calls `touch` after writing.

    is_left   the pages were left in memory by a predecessor, and may be newer than those in the file
    """

    def __init__(self, env: Env, name: str, file: File, place: int, size: int, token: bytes) -> None:
        """Take the pages that a predecessor left in the memory `name` for this file, or read them from the file.

        `size` is in bytes, a multiple of PAGE; the file has as many at `place`. `token` is unique to the file.
        Raises: OSError.
        """
        self._memory = env.memory(name, size + PAGE)
        self.bytes = self._memory[:size]
        self._file, self._place = file, place
        self._pool = Pool()
        self._dirty: set[int] = set()  # pages that differ from those in the file
        self._waiting: list[Done] = []  # callers of `flush` that wait for the next round
        self._is_flushing = False
        self.is_left = self._memory[size : size + TOKEN] == token
        for start in range(0, size, _PIECE):
            found = file.read_at(place + start, min(_PIECE, size - start))
            if not self.is_left:
                self.bytes[start : start + len(found)] = found
            elif self.bytes[start : start + len(found)] != found:
                pages = range(start, start + len(found), PAGE)
                self._dirty.update(
                    at // PAGE for at in pages if self.bytes[at : at + PAGE] != found[at - start : at - start + PAGE]
                )
        self._token = token

    def are_sound(self) -> None:
        """Allow a successor to take the pages from memory. The owner calls this after checking them."""
        self._memory[len(self.bytes) : len(self.bytes) + TOKEN] = self._token

    def touch(self, page: int) -> None:
        """Note that a page was changed. The data that it describes must have been written to the file before."""
        self._dirty.add(page)

    def flush(self, done: Done) -> None:
        """Make all data and page changes so far durable; then call `done` with 0 or an errno."""
        self._waiting.append(done)
        if not self._is_flushing:
            self._begin()

    def _begin(self) -> None:
        self._is_flushing = True
        waiting, self._waiting = self._waiting, []
        pages = {page: self.bytes[page * PAGE : (page + 1) * PAGE].tobytes() for page in self._dirty}
        self._dirty.clear()
        self._sync(lambda status: self._write(status, pages, waiting))

    def _sync(self, done: Done) -> None:
        self._file.submit([self._pool.take(Op.FLUSH, 0, 0, (), tell, done)])

    def _write(self, status: int, pages: dict[int, bytes], waiting: list[Done]) -> None:
        """Write pages, and make them durable."""
        if status or not pages:
            self._end(status, pages if status else {}, waiting)
            return
        parts, statuses, order = list[Request](), list[int](), sorted(pages)

        def written(status: int) -> None:
            statuses.append(status)
            if len(statuses) < count:
                return
            failed = max(statuses)
            if failed:
                self._end(failed, pages, waiting)
            else:
                self._sync(lambda status: self._end(status, pages if status else {}, waiting))

        for start in range(0, len(order), _TOGETHER):
            group = order[start : start + _TOGETHER]
            memory = allocate(len(group) * PAGE)  # shared: the kernel limits a process's mappings
            for at, page in enumerate(group):
                memory[at * PAGE : (at + 1) * PAGE] = pages[page]
            gaps = [at for at in range(1, len(group)) if group[at] != group[at - 1] + 1]
            for first, last in pairwise([0, *gaps, len(group)]):
                place, view = self._place + group[first] * PAGE, memory[first * PAGE : last * PAGE]
                parts.append(self._pool.take(Op.WRITE, place, len(view), [view], tell, written))
        count = len(parts)
        self._file.submit(parts)

    def _end(self, status: int, unwritten: dict[int, bytes], waiting: list[Done]) -> None:
        self._dirty.update(unwritten)
        self._is_flushing = False
        if self._waiting:
            self._begin()
        for done in waiting:
            done(status)

    @property
    def is_idle(self) -> bool:
        """Whether no request of ours to the file is under way."""
        return not self._pool.lent

    def take(self, part: Part) -> None:
        """Complete a part of ours that the file has given back."""
        part.done(part)
        self._pool.put(part)

    def owns(self, part: Part) -> bool:
        """Return whether a part is ours."""
        return part.pool is self._pool

    def write_out(self) -> None:
        """Write all changed pages and make them durable, blocking. For `open` and `close` only. Raises: OSError."""
        if self._dirty:
            self._file.sync()
            for start in (page * PAGE for page in sorted(self._dirty)):
                self._file.write_at(self._place + start, self.bytes[start : start + PAGE].tobytes())
            self._file.sync()
            self._dirty.clear()

    def close(self, *, writes: bool) -> None:
        """Release the memory; if `writes` is true, call `write_out` first. Raises: OSError."""
        try:
            if writes:
                self.write_out()
        finally:
            self.bytes.release()
            self._memory.release()
