"""I/O of a write-back cache: sends requests to FILE and the layer below as parts of its own, and answers, in batches.

Must not know which blocks are dirty.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from xenbackend.block.cache_map import CacheMap
from xenbackend.block.cache_parts import PATIENCE
from xenbackend.block.durable_tags import DurableTags
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.mapped.parts import Part, Pool, cut
from xenbackend.block.request import Op, Request
from xenbackend.units import PAGE

if TYPE_CHECKING:
    from xenbackend.block.driver import Filter, HostFile
    from xenbackend.block.formats.cache import BackHeader


class BackIO:
    """I/O of one cache; base class of `WriteBack`. `on_lost` gets the errno of each failed flush of the layer below."""

    on_lost: Callable[[int], None]

    def __init__(self, driver: Filter, file: HostFile, header: BackHeader) -> None:
        """Take map and tags from memory, or the tags from FILE. Raises: OSError."""
        assert driver.below is not None  # noqa: S101 - as in `Filter.open`
        self._driver, self._env, self._file, self._below = driver, driver.env, file, driver.below
        self.block, self._data_at = header.block, header.data_at
        self._bits = header.block.bit_length() - 1
        self.map = CacheMap(self._env, header.blocks, header.token, block=header.block, data_at=header.data_at)
        self.tags = DurableTags(self._env, file, HEADER_SIZE, header.map_size, header.token)
        self._pool = Pool()
        self._down: list[Request] = []
        self._to_file: list[Request] = []
        self._back: list[Request] = []
        self._is_passing = False
        self._gone_below = 1  # writes and discards below that have ended; 1 stands for those of a predecessor
        self._flushed_below = 0  # how many of them the last flush has covered
        self._lost = self._env.memory("lost", PAGE)  # a byte: see `lose`
        self._is_told = False
        self._errors = self._in_a_row = 0
        self.is_shunned = self._env.read_only  # no more blocks are put into FILE

    def take_back(self, batch: list[Request]) -> None:
        """Continue with what FILE or the layer below gives back, which are parts of ours only."""
        for part in batch:
            if self.tags.pages.owns(part):  # type: ignore[arg-type]  # as the docstring says
                self.tags.pages.take(part)  # type: ignore[arg-type]  # the same
            else:
                part.done(part)  # type: ignore[attr-defined]  # the same
                self._pool.put(part)  # type: ignore[arg-type]  # the same
        self.pass_on()

    def pass_on(self) -> None:
        """Send the collected requests: to the layer below, to FILE, and back to the layer above."""
        if self._is_passing:
            return  # requests completed within `submit` are passed on by the loop below, in batches
        self._is_passing = True
        try:
            while self._down or self._to_file or self._back:
                down, self._down = self._down, []
                to_file, self._to_file = self._to_file, []
                back, self._back = self._back, []
                if down:
                    self._driver.next.submit(down)  # type: ignore[union-attr]  # a filter in a chain has a layer below
                if to_file:
                    self._file.submit(to_file)
                if back:
                    self._driver.complete(back)
                    if self._is_told:  # only now: a kill in between must not lose the error
                        self._lost[0], self._is_told = 0, False
        finally:
            self._is_passing = False

    def send_below(
        self, op: int, place: int, iov: Sequence[memoryview], length: int, done: Callable[[Part], None]
    ) -> None:
        """Send a request to the layer below as a part; call `done` when it has ended."""

        def back(part: Part) -> None:
            self._gone_below += op != Op.READ
            done(part)

        self._down.append(self._pool.take(op, place, length, iov, back, None))

    def send_to_slot(
        self, op: int, slot: int, at: int, iov: Sequence[memoryview], done: Callable[[Part], None]
    ) -> None:
        """Read or write a part of a slot, which is pinned until that has ended; then call `done`."""
        self.map.pins[slot] += 1

        def back(part: Part) -> None:
            self.map.pins[slot] -= 1
            self._note_error(part.status)
            done(part)

        place, length = self._data_at + (slot << self._bits) + at, sum(map(len, iov))
        self._to_file.append(self._pool.take(op, place, length, iov, back, None))

    def flush_below(self, done: Callable[[int], None]) -> None:
        """Flush the layer below if it was written to since the last flush; call `done` with 0 or an errno."""
        gone = self._gone_below
        if not self._below.can_flush or gone == self._flushed_below:
            done(0)
            return

        def flushed(part: Part) -> None:
            if part.status:
                self.on_lost(part.status)
            else:
                self._flushed_below = max(self._flushed_below, gone)
            done(part.status)

        self._down.append(self._pool.take(Op.FLUSH, 0, 0, (), flushed, None))

    def lose(self, status: int) -> None:
        """Make the guest's next flush fail with `status`, even in a successor: the kernel reports errors only once."""
        self._lost[0] = self._lost[0] or min(status, 255)

    def tell(self, request: Request, status: int) -> None:
        """Give back the guest's flush with `status`, or else with the error that `lose` has noted."""
        status = status or self._lost[0]
        self._is_told |= status != 0
        self._end(request, status)

    def _note_error(self, status: int) -> None:
        if not status:
            self._in_a_row = 0
            return
        self._errors += 1
        self._in_a_row += status not in (errno.ENOSPC, errno.EDQUOT)
        if self._in_a_row >= PATIENCE and not self.is_shunned:
            self.is_shunned = True
            self._env.report(
                "cache", "FILE gives errors: no more blocks are put into it, and requests for dirty blocks wait"
            )

    def _end(self, request: Request, status: int) -> None:
        request.status = status
        self._back.append(request)

    def _pieces(self, request: Request, slots: Sequence[int]) -> Iterator[tuple[int, int, int, list[memoryview]]]:
        """Yield slot, place on the disk, length and memory of each block of a request; join blocks without a slot."""
        first, end, runs = request.offset >> self._bits, request.offset + request.length, list[tuple[int, int, int]]()
        for block, slot in enumerate(slots, first):
            start, stop = max(request.offset, block << self._bits), min(end, (block + 1) << self._bits)
            if slot < 0 and runs and runs[-1][0] < 0:
                runs[-1] = (-1, runs[-1][1], stop)
            else:
                runs.append((slot, start, stop))
        memory = cut(request.iov, [stop - start for _, start, stop in runs])
        for (slot, start, stop), iov in zip(runs, memory, strict=True):
            yield slot, start, stop - start, iov
