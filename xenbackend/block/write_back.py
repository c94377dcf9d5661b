"""The requests of a write-back cache, which answers a write once it is in FILE, and destages it later.

Must not destage parts of blocks, nor treat a block as destaged before a flush of the layer below made it durable:

    write     FILE -> tag in memory -> answer
    flush     data in FILE made durable -> tags written and made durable; the layer below flushed, too -> answer
    destage   FILE -> below -> the layer below flushed -> tag removed -> removal made durable -> the slot is free

So after a power failure a block is in FILE if FILE has a tag for it, otherwise below, and each of its sectors is as it
was at the last flush, or newer. The tags of a killed worker are in memory (`durable_tags`).

A dirty block is written to in its slot, by any number of requests at once. A clean block becomes dirty under a hold
(`holds`), by a single write, once FILE has completed it: in the slot that the block has, or in a new one, together with
the rest of the block read from below. Until then all that was answered is in the layer below, so the write can go there
if there is no room, or FILE gives an error. A dirty block has data that are nowhere else, so a write to it needs FILE.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from errno import EOPNOTSUPP
from functools import partial
from typing import TYPE_CHECKING

from xenbackend.block.back_reads import BackReads
from xenbackend.block.cache_map import WAYS
from xenbackend.block.copies import fill
from xenbackend.block.destage import Destage
from xenbackend.block.holds import Holds
from xenbackend.block.mapped.parts import Join, Part
from xenbackend.block.request import CACHE_LOST, Op, Request

if TYPE_CHECKING:
    from xenbackend.block.driver import Filter, HostFile
    from xenbackend.block.formats.cache import BackHeader

MAX_DIRTY = 1 << 16  # blocks; writes under way at the limit can add a few more
_MOST_LEFT = 8 * MAX_DIRTY  # dirty blocks; no predecessor can have left more
_CLOSING_S = 5.0  # time to destage dirty blocks in `close`


class _Altering(Join):
    """A write or discard under way, with its blocks. `is_held`: there is a hold on them."""

    __slots__ = ("first", "is_held", "last")

    def __init__(self, request: Request, first: int, last: int, *, is_held: bool) -> None:
        super().__init__(request, 1)
        self.first, self.last, self.is_held = first, last, is_held


class WriteBack(BackReads):
    """The requests of one disk."""

    def __init__(self, driver: Filter, file: HostFile, header: BackHeader, *, rate: int) -> None:
        """Take the map from memory, or from FILE. `rate`: limit for destaging in bytes per second; 0: no limit.

        Raises: DriverError, OSError.
        """
        super().__init__(driver, file, header)
        self.tags.check(WAYS, self.map.slots // WAYS, self._whole, _MOST_LEFT)
        self._holds = Holds()
        self._writing: Counter[int] = Counter()  # by slot: the guest's writes to a dirty block that are under way
        self._around = 0
        self.destage = Destage(self, self._env, limit=min(MAX_DIRTY, self.map.slots * 3 // 4), rate=rate)
        self.on_lost = self.destage.begin_anew
        for slot, block in self.tags.tagged():
            self.map.restore(slot, block)
            self.destage.add(block, slot)

    # entry points

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does."""
        batch = self.read_found(batch)
        for request in batch:
            if request.op == Op.READ:
                self.read(request)
            elif request.op == Op.FLUSH:
                self._flush(request)
            else:
                self.alter(request)
        self.pass_on()

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return {
            "hits": self._hits,
            "misses": self._misses,
            "errors": self._errors,
            "dirty": len(self.destage.dirty),
            "destaged": self.destage.count,
            "around": self._around,
        }

    def close(self) -> None:
        """Destage for at most a few seconds, and release the memory. Raises: OSError."""
        try:
            self.destage.drain(_CLOSING_S)
            self.destage.is_closed = True
            self._env.wait_for(lambda: not self._pool.lent and self.tags.pages.is_idle)
            if self.destage.dirty:  # make FILE's time the later one; `cache_file` uses it to see if others wrote below
                self.destage.tell_left(self._driver.options.file)
                self.tags.pages.touch(0)
        finally:
            self.tags.close(writes=not self._env.read_only)
            self.map.close()
            self._lost.release()

    # writes and discards

    def alter(self, request: Request) -> None:
        """Execute a write or a discard; if there is a hold on one of its blocks, when that is removed."""
        first, last = self._blocks(request)
        if request.op == Op.DISCARD and not self._below.can_discard:
            self._end(request, EOPNOTSUPP)
        elif (hold := self._holds.find(first, last)) is not None:
            hold.waiting.append(request)
        elif request.op == Op.DISCARD:
            self._discard(request, first, last)
        else:
            dirty, blocks = self.destage.dirty, range(first, last + 1)
            is_dirty = all(block in dirty for block in blocks)
            if is_dirty and first == last:
                self._write_one(request, first, self.map.find(first))
                return
            join = self._begin(request, first, last, is_held=not is_dirty)
            slots = [self._slot_for(request, block) for block in blocks]
            for slot, place, length, iov in self._pieces(request, slots):
                join.left += 1
                self._write(join, slot, place, length, iov)
            for block, slot in enumerate(slots, first):
                if slot >= 0 and block in dirty:
                    self.map.pins[slot] -= 1  # `_slot_for` pinned it; it stays pinned as dirty, and by the write to it
            self._altered(join, 0)

    def _write_one(self, request: Request, block: int, slot: int) -> None:
        """Write to the slot of one dirty block: the common case of `alter`, with less work."""
        self._overtaken.begin(block, block)
        self.destage.add(block, slot)
        self._writing[slot] += 1
        self.map.pins[slot] += 1
        place = self._data_at + (slot << self._bits) + (request.offset & (self.block - 1))
        tag = (request, slot, block)
        self._to_file.append(self._pool.take(Op.WRITE, place, request.length, request.iov, self._one_written, tag))

    def _one_written(self, part: Part) -> None:
        request, slot, block = part.tag
        self.map.pins[slot] -= 1
        self._note_error(part.status)
        self._writing[slot] -= 1
        if not self._writing[slot]:
            del self._writing[slot]
        self._overtaken.end(block, block)
        self._end(request, part.status and CACHE_LOST)

    def _begin(self, request: Request, first: int, last: int, *, is_held: bool) -> _Altering:
        if is_held:
            self._holds.add(request.op, first, last)
        self._overtaken.begin(first, last)
        return _Altering(request, first, last, is_held=is_held)

    def _altered(self, join: _Altering, status: int) -> None:
        join.left -= 1
        join.status = join.status or status
        if join.left:
            return
        self._overtaken.end(join.first, join.last)
        self._end(join.request, join.status)
        if join.is_held:
            for each in self._holds.remove(join.request.op, join.first, join.last):
                self.alter(each)

    def _slot_for(self, request: Request, block: int) -> int:
        """Return the slot to which a block is to be written, pinned so that the request's next block cannot take it.

        -1: there is none; the write goes below, and the map has no slot for the block any more.
        """
        slot = self.map.find(block)  # only now: a previous block of the request may have taken its slot
        if slot >= 0 and self.destage.has_room((block,)):
            self.map.pins[slot] += 1
            return slot
        self.map.drop(block, block)
        if self.is_shunned or block >= self._whole or not self._may_keep(request, 1):
            return -1
        if not self.destage.has_room((block,)):
            return -1
        return self.map.take(block)  # unpinned once the write has ended

    def _write(self, join: _Altering, slot: int, place: int, length: int, iov: Sequence[memoryview]) -> None:
        """Write a piece to its slot, or below."""
        block = place >> self._bits
        if slot < 0:
            self._around += 1
            self.send_below(Op.WRITE, place, iov, length, lambda part: self._altered(join, part.status))
        elif block in self.destage.dirty:
            self.write_dirty(block, slot, place & (self.block - 1), iov, partial(self._kept_dirty, join))
        else:
            self._write_first(join, slot, block, place, length, iov)

    def _write_first(
        self, join: _Altering, slot: int, block: int, place: int, length: int, iov: Sequence[memoryview]
    ) -> None:
        """Make a block dirty: write the piece to the slot that has it, or the whole block to a slot taken for it.

        If that fails, write the piece below. Meanwhile the map has no entry for the slot: otherwise a kill could leave
        a part of the write in a clean block, which may be replaced by the content below at any time.
        """
        has_rest = self.map.find(block) == slot
        self.map.drop(block, block)
        memory = self._copies.take(self.block) if length < self.block and not has_rest else None

        def read(part: Part) -> None:
            if part.status or memory is None:  # then the piece goes below, for which the rest is not needed
                written(part)
                return
            fill(memory, place & (self.block - 1), iov)
            self.send_to_slot(Op.WRITE, slot, 0, [memory], written)

        def written(part: Part) -> None:
            if not part.status:
                self.destage.add(block, slot)
                self.tags.put(slot, block)
                self.map.put(slot, block)
            self.map.pins[slot] -= 1
            if memory is not None:
                self._copies.put(memory)
            if part.status:
                self._write(join, -1, place, length, iov)
            else:
                self._altered(join, 0)

        if memory is None:
            self.send_to_slot(Op.WRITE, slot, place & (self.block - 1), iov, written)
        else:
            self.send_below(Op.READ, block << self._bits, [memory], self.block, read)

    def write_dirty(
        self, block: int, slot: int, at: int, iov: Sequence[memoryview], done: Callable[[Part], None]
    ) -> None:
        """Write to the slot of a dirty block; if it is being destaged, it will be destaged again."""
        self.destage.add(block, slot)
        self._writing[slot] += 1

        def written(part: Part) -> None:
            self._writing[slot] -= 1
            if not self._writing[slot]:
                del self._writing[slot]
            done(part)

        self.send_to_slot(Op.WRITE, slot, at, iov, written)

    def _kept_dirty(self, join: _Altering, part: Part) -> None:
        self._altered(join, part.status and CACHE_LOST)

    def is_held(self, block: int) -> bool:
        """Return whether there is a hold on a block."""
        return self._holds.find(block, block) is not None

    def is_written(self, slot: int) -> bool:
        """Return whether a write to the slot of a dirty block is under way."""
        return slot in self._writing

    def _discard(self, request: Request, first: int, last: int) -> None:
        """Discard below, then drop the blocks from FILE. Dirty blocks that are covered in part get zeros there."""
        if self.destage.is_moving(first, last):  # otherwise old data could reach the layer below after the discard
            self.destage.waiting.append(request)
            return
        end = request.offset + request.length
        join = self._begin(request, first, last, is_held=True)
        inside = []
        for block, (slot, _) in self.destage.within(first, last):
            start, stop = max(request.offset, block << self._bits), min(end, (block + 1) << self._bits)
            if stop - start == self.block:
                inside.append(block)
            else:
                join.left += 1
                zeros = memoryview(bytearray(stop - start))
                self.write_dirty(block, slot, start & (self.block - 1), [zeros], partial(self._kept_dirty, join))
        self._drop_clean(first, last)

        def discarded(part: Part) -> None:
            if part.status or not inside:
                self._altered(join, part.status)
            else:
                self.flush_below(flushed)

        def flushed(status: int) -> None:
            if status:
                self.lose(status)
            for block in inside if not status else ():
                if block in self.destage.dirty:
                    self.destage.forget(block)
                self.map.drop(block, block)
            self._altered(join, status)

        self.send_below(Op.DISCARD, request.offset, (), request.length, discarded)

    def _drop_clean(self, first: int, last: int) -> None:
        dirty = self.destage.dirty
        if self._overtaken.is_wide(first, last):
            self.map.clear()
            for block, (slot, _) in dirty.items():
                self.map.restore(slot, block)
            return
        for block in range(first, last + 1):
            if block not in dirty:
                self.map.drop(block, block)

    def _flush(self, request: Request) -> None:
        """Make all answered writes durable: in FILE, with their tags, and in the layer below."""
        join = Join(request, 1 if self._env.read_only else 2)

        def done(status: int) -> None:
            join.left -= 1
            join.status = join.status or status
            if not join.left:
                self.tell(request, join.status)

        self.flush_below(done)
        if not self._env.read_only:
            self.tags.flush(done)
