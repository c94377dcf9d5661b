"""The sums of a disk's blocks: in memory that outlives the worker, and in a file, with a log of pages in doubt.

Must not read a disk, nor compute a sum.

Data and sums are on two media, and a power failure must not make data that were written look rotten. So before the
first block of a page of sums is altered, the log durably marks this page as in doubt, and the mark stays until

    the data are durable below -> the sums are written -> made durable -> and nothing was written there meanwhile

After a power failure the sums of pages in doubt are forgotten. The memory of a killed worker is kept, with all sums:
there the sum of a block counts as unknown from before its write is sent until the write is done.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from xenbackend.block.driver import Env, File
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.checksum import PAGE, SUMS, Header
from xenbackend.block.mapped.parts import Part, Pool, allocate, tell
from xenbackend.block.request import Op
from xenbackend.loop.steps import Line, Step, Steps

REST_S = 5.0  # a page stays in doubt for that long after the last write
_TOKEN = 16  # bytes at the end of the memory: the token of the file, set when that has been read
_PIECE = 1 << 20  # bytes of the file that are read at once when it is opened
_MARKED = re.compile(rb"[^\0]")
Done = Callable[[int], None]  # gets 0 or a positive errno


class Sums:
    """The sums of one disk. `values` has one for each block, 0 if it is not known; only methods here change it."""

    def __init__(self, env: Env, file: File, header: Header, flush_below: Step) -> None:
        """Take the sums that a predecessor left in memory for this file, else those in the file. Raises: OSError.

        `flush_below` flushes the layer below.
        """
        size = header.pages * PAGE
        self._env, self._file, self._header, self._flush_below = env, file, header, flush_below
        self._memory = env.memory("sums", size + header.log_size + PAGE)
        self.values = self._memory[:size].cast("I")
        self._log = self._memory[size : size + header.log_size]
        self._pool = Pool()
        self._line = Line()
        self._epochs: Counter[int] = Counter()  # by page: how often altering its blocks has begun or ended
        self._busy: Counter[int] = Counter()  # by page: number of requests under way that need it to be in doubt
        self._loaded: set[int] = set()  # pages that were read from the file
        self._stale: set[int] = set()  # pages that the file does not have in their present state
        self._recent: set[int] = set()  # pages that were altered since the last `_look`
        self._unflushed: set[int] = set()  # pages with data that may not be durable below
        self._wanted: set[int] = set()  # pages that are to be marked as in doubt
        self._waiting: list[Done] = []  # callbacks for when they are
        self._has_timer = self._is_closed = self._is_flushing = False
        end = len(self._memory) - PAGE
        self.is_left = self._memory[end : end + _TOKEN] == header.token
        if not self.is_left:
            self._load(is_fresh=not any(self._memory[end : end + _TOKEN]))
            self._memory[end : end + _TOKEN] = header.token
        doubtful = self._doubtful()
        self._stale.update(doubtful)
        self._unflushed.update(doubtful)

    def _load(self, *, is_fresh: bool) -> None:
        """Read the log and the sums, and forget the sums in doubt."""
        header, sums = self._header, self._memory[: self._header.pages * PAGE]
        if not is_fresh:
            self._forget(range(header.pages))
        self._log[:] = self._file.read_at(HEADER_SIZE, header.log_size).ljust(header.log_size, b"\0")
        place, end = header.sums_at, header.sums_at + len(sums)
        while place < end:
            start, stop = self._file.next_data(place)  # skips holes: most of a large disk may be unknown
            start, stop = max(place, start // PAGE * PAGE), min(end, stop)
            if start >= end or start >= self._file.size:
                break
            found = self._file.read_at(start, min(_PIECE, max(PAGE, stop - start)))
            sums[start - header.sums_at : start - header.sums_at + len(found)] = found
            first = (start - header.sums_at) // PAGE
            self._loaded.update(range(first, first + len(found) // PAGE))
            place = start + max(PAGE, len(found) // PAGE * PAGE)
        for page in self._doubtful():
            sums[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        sums.release()

    def _forget(self, pages: Iterable[int]) -> list[int]:
        """Forget the sums of pages, and return the pages that had any. Pages that were never used stay unallocated."""
        zeros, cleared = bytes(PAGE), []
        for page in pages:
            sums = self._memory[page * PAGE : (page + 1) * PAGE]
            if sums != zeros:
                sums[:] = zeros
                cleared.append(page)
        return cleared

    def _doubtful(self) -> list[int]:
        return [each.start() for each in _MARKED.finditer(self._log[: self._header.pages])]

    @property
    def is_in_doubt(self) -> bool:
        """Whether any page is in doubt, so that a power failure or the loss of the memory would forget sums."""
        return any(self._log)

    def forget(self) -> None:
        """Forget all sums. For `open` only: nothing is in flight."""
        self._stale.update(self._forget(self._loaded))

    def epoch(self, first: int, last: int) -> int:
        """Return a number that changes when altering a block from `first` to `last` begins or ends."""
        page, other = first // SUMS, last // SUMS
        epochs = self._epochs
        return epochs[page] if page == other else sum(epochs[each] for each in range(page, other + 1))

    def put(self, first: int, sums: list[int]) -> None:
        """Set the sums of blocks from `first` on; they are written to the file later."""
        last = first + len(sums) - 1
        if first == last:
            self.values[first] = sums[0]
            self._stale.add(first // SUMS)
            self._watch()
            return
        for block, value in enumerate(sums, first):
            self.values[block] = value
        self._stale.update(range(first // SUMS, last // SUMS + 1))
        self._watch()

    def doubt(self, first: int, last: int, done: Done) -> bool:
        """Have the pages of these blocks marked as in doubt until `end`; return whether they are already.

        If not, `done` is called with the status when the marks are durable.
        """
        pages = range(first // SUMS, last // SUMS + 1)
        for page in pages:
            self._busy[page] += 1
        if all(self._log[pages.start : pages.stop]):
            return True
        self._wanted.update(pages)
        self._waiting.append(done)
        if len(self._waiting) == 1:
            self._line.add(self._note_doubt())
        return False

    def begin(self, first: int, last: int) -> None:
        """Note that blocks are being altered, whose pages are in doubt already: their sums are unknown now."""
        step = 64 << 10
        if first == last:
            self.values[first] = 0
            self._alter((first // SUMS,))
            return
        for start in range(first, last + 1, step):
            count = min(step, last + 1 - start)
            self.values[start : start + count] = memoryview(bytes(4 * count)).cast("I")
        self._alter(range(first // SUMS, last // SUMS + 1))

    def end(self, first: int, last: int) -> None:
        """Note that altering blocks has ended, successfully or not; the counterpart of `doubt`."""
        pages = range(first // SUMS, last // SUMS + 1)
        for page in pages:
            self._busy[page] -= 1
        self._alter(pages)

    def _alter(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._epochs[page] += 1
        for each in (self._stale, self._recent, self._unflushed):
            each.update(pages)
        self._watch()

    def flushing(self) -> Callable[[], None]:
        """Return a function to be called if a flush of the layer below that begins now has succeeded."""
        epochs = {page: self._epochs[page] for page in self._unflushed}

        def flushed() -> None:
            self._unflushed.difference_update(page for page, epoch in epochs.items() if self._epochs[page] == epoch)

        return flushed

    def take(self, part: Part) -> None:
        """Take back one of our parts from the file."""
        part.done(part)
        self._pool.put(part)

    def owns(self, part: Part) -> bool:
        """Return whether a part is one of ours."""
        return part.pool is self._pool

    def close(self, *, writes: bool) -> None:
        """Release the memory; if `writes`, first write everything to the file. Raises: OSError."""
        self._is_closed = True
        self._env.wait_for(lambda: not (self._pool.lent or self._is_flushing))  # or their writes may follow ours
        try:
            if writes:
                for page in sorted(self._stale):
                    place = self._header.sums_at + page * PAGE
                    self._file.write_at(place, self._memory[page * PAGE : (page + 1) * PAGE].tobytes())
                self._file.sync()
                for page in set(self._doubtful()) - self._unflushed:
                    self._log[page] = 0
                self._file.write_at(HEADER_SIZE, self._log.tobytes())
                self._file.write_at(0, self._header.pack())  # gives the file its time of change
                self._file.sync()
        finally:
            for view in (self.values, self._log, self._memory):
                view.release()

    # Operations on the file while the disk is in service, one after the other.

    def _watch(self) -> None:
        if not (self._has_timer or self._env.read_only):
            self._has_timer = True
            self._env.call_later(REST_S, self._look)

    def _look(self) -> None:
        """Settle the pages to which nothing was written for a while."""
        self._has_timer = False
        if self._is_closed:
            return
        doubtful = set(self._doubtful())
        quiet = {page: self._epochs[page] for page in doubtful - self._recent if not self._busy[page]}
        self._recent = set()
        flushed = self.flushing()

        def settle(status: int) -> None:
            if not status:
                flushed()
                self._line.add(self._settle(quiet))
            self._is_flushing = False

        if quiet and not self._is_flushing:
            self._is_flushing = True
            self._flush_below(settle)
        elif self._stale - doubtful:
            self._line.add(self._settle({}))
        if doubtful:
            self._watch()

    def _note_doubt(self) -> Steps[None]:
        pages, self._wanted = self._wanted, set()
        waiting, self._waiting = self._waiting, []
        status = 0
        try:
            yield partial(self._write_log, pages, 1)
            yield self._sync
            for page in pages:
                self._log[page] = 1
        except OSError as error:
            status = error.errno or errno.EIO
        for done in waiting:
            done(status)

    def _settle(self, epochs: dict[int, int]) -> Steps[None]:
        """Write sums to the file; clear the doubt of pages whose data are durable and were not altered meanwhile.

        If that fails, it is tried again later.
        """
        stale = self._stale & epochs.keys() | self._stale - set(self._doubtful())
        try:
            yield partial(self._write_sums, stale)
            yield self._sync
        except OSError:
            self._stale |= stale
            return
        settled = {page for page, epoch in epochs.items() if self._epochs[page] == epoch and not self._busy[page]}
        for page in settled:
            self._log[page] = 0
        yield partial(self._write_log, settled, 0)

    def _write_sums(self, pages: set[int], done: Done) -> None:
        self._stale -= pages
        places = {self._header.sums_at + page * PAGE: self._memory[page * PAGE : (page + 1) * PAGE] for page in pages}
        self._write(places, done)

    def _write_log(self, pages: Iterable[int], state: int, done: Done) -> None:
        """Write the log to the file with a new state for these pages; the log in memory is not changed."""
        places = {}
        for start in {page // PAGE * PAGE for page in pages}:
            data = bytearray(self._log[start : start + PAGE])
            for page in pages:
                if start <= page < start + PAGE:
                    data[page - start] = state
            places[HEADER_SIZE + start] = memoryview(data)
        self._write(places, done)

    def _write(self, places: dict[int, memoryview], done: Done) -> None:
        if not places:
            done(0)
            return
        statuses: list[int] = []

        def written(status: int) -> None:
            statuses.append(status)
            if len(statuses) == len(places):
                done(max(statuses))

        parts = []
        for place, data in places.items():
            memory = allocate(PAGE)
            memory[:] = data
            parts.append(self._pool.take(Op.WRITE, place, PAGE, [memory], tell, written))
        self._file.submit(parts)  # type: ignore[arg-type]  # each is a request

    def _sync(self, done: Done) -> None:
        self._file.submit([self._pool.take(Op.FLUSH, 0, 0, (), tell, done)])
