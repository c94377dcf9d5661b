"""Pages of a filter's file in memory that outlives the worker, and in the file as of the last flush.

Must not know what is in them, nor put one into the file before what it tells of is durable there:

    flush    the file's data are made durable -> pages as they were before that -> made durable, too

So what the file has after a power failure are earlier pages, of data that are all there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from xenbackend.block.driver import Env, File
from xenbackend.block.mapped.parts import Part, Pool, allocate, tell
from xenbackend.block.request import Op, Request

PAGE = 4096  # bytes that are written together, at least
_TOGETHER = 256  # pages at most
_PIECE = 1 << 20  # bytes that are read at once, while it is opened
TOKEN = 16  # bytes behind the pages in memory: of which file they are, once they were read
Done = Callable[[int], None]  # gets 0 or a positive errno


class DurablePages:
    """The pages; `bytes` may be read at will, and is written by the owner, who says so by `touch`.

    is_left   a predecessor has left them in memory, and not all of them need be in the file
    """

    def __init__(self, env: Env, name: str, file: File, place: int, size: int, token: bytes) -> None:
        """Take what a predecessor left of this file in the memory `name`, else what the file has at `place`.

        `size` is in bytes, whole pages; at `place` the file has as many. No other file has this `token`. Raises:
        OSError.
        """
        self._memory = env.memory(name, size + PAGE)
        self.bytes = self._memory[:size]
        self._file, self._place = file, place
        self._pool = Pool()
        self._dirty: set[int] = set()  # pages that the file does not have as they are
        self._waiting: list[Done] = []  # for the next round
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
        """Let a successor take them from memory."""
        self._memory[len(self.bytes) : len(self.bytes) + TOKEN] = self._token

    def touch(self, page: int) -> None:
        """Take note that a page was altered; everything that it tells of has been given to the file."""
        self._dirty.add(page)

    def flush(self, done: Done) -> None:
        """Make durable what was given to the file, and marked, before; `done` hears how that ended."""
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
            memory = allocate(len(group) * PAGE)  # not one for each: the kernel gives a process only so many
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
        """Whether the file has nothing of ours under way."""
        return not self._pool.lent

    def take(self, part: Part) -> None:
        """Take back a part of ours that the file has given back."""
        part.done(part)
        self._pool.put(part)

    def owns(self, part: Part) -> bool:
        """Return whether a part is ours."""
        return part.pool is self._pool

    def write_out(self) -> None:
        """Bring everything into the file, blocking. For `open` and `close` only. Raises: OSError."""
        if self._dirty:
            self._file.sync()
            for start in (page * PAGE for page in sorted(self._dirty)):
                self._file.write_at(self._place + start, self.bytes[start : start + PAGE].tobytes())
            self._file.sync()
            self._dirty.clear()

    def close(self, *, writes: bool) -> None:
        """Let go of the memory; if it `writes`, bring everything into the file before. Raises: OSError."""
        try:
            if writes:
                self.write_out()
        finally:
            self.bytes.release()
            self._memory.release()
