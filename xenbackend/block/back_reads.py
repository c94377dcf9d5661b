"""Reads of a write-back cache: from FILE if it has the block, otherwise from below.

Must not read a dirty block from below.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from xenbackend.block.back_io import BackIO
from xenbackend.block.cache_parts import MOST
from xenbackend.block.copies import Copies, give
from xenbackend.block.mapped.parts import Join, Part
from xenbackend.block.overtaken import Overtaken
from xenbackend.block.request import CACHE_LOST, Op, Request

if TYPE_CHECKING:
    from xenbackend.block.destage import Destage
    from xenbackend.block.driver import Filter, HostFile
    from xenbackend.block.formats.cache import BackHeader

_AGAIN = -1  # status of a read for which FILE failed, but which can be repeated, from below


class BackReads(BackIO):
    """The reads of one cache; base class of `WriteBack`, which sets `destage`."""

    destage: Destage

    def __init__(self, driver: Filter, file: HostFile, header: BackHeader) -> None:
        """Begin as `BackIO` does. Raises: OSError."""
        super().__init__(driver, file, header)
        self._whole = self._below.size >> self._bits  # an incomplete last block is not cached: the disk may grow
        self._copies, self._overtaken = Copies(), Overtaken()
        self._hits = self._misses = 0

    def read_found(self, batch: list[Request]) -> list[Request]:
        """Execute reads within a block that `map.places` has, as most hits are; return the other requests."""
        done, late, rest = self._file.read_mapped(batch, self.map.places)
        if done:
            self._in_a_row = 0
            self._back += done
        for request, place in late:
            self._read_one(request, place - self._data_at >> self._bits, place)
        self._hits += len(done) + len(late)
        return rest

    def read(self, request: Request) -> None:
        """Execute any read."""
        first, last = self._blocks(request)
        slot = self.map.find(first)
        if slot >= 0 and first == last:  # the common case: the same as below, with less work
            self._hits += 1
            self._read_one(request, slot, self._data_at + (slot << self._bits) + (request.offset & (self.block - 1)))
            return
        slots = [slot, *map(self.map.find, range(first + 1, last + 1))]
        if max(slots) < 0:
            self._misses += 1
            self._miss(request, first, last)
            return
        self._hits += min(slots) >= 0
        self._misses += min(slots) < 0
        join = Join(request, 1)
        for slot, place, length, iov in self._pieces(request, slots):
            join.left += 1
            if slot < 0:
                self.send_below(Op.READ, place, iov, length, lambda part: self._read_done(join, part.status))
            else:
                done = partial(self._slot_read, join, slot, place >> self._bits)
                self.send_to_slot(Op.READ, slot, place & (self.block - 1), iov, done)
        self._read_done(join, 0)

    def _read_one(self, request: Request, slot: int, place: int) -> None:
        self.map.pins[slot] += 1
        tag = request, slot, request.offset >> self._bits
        self._to_file.append(self._pool.take(Op.READ, place, request.length, request.iov, self._one_read, tag))

    def _one_read(self, part: Part) -> None:
        request, slot, block = part.tag
        self.map.pins[slot] -= 1
        self._note_error(part.status)
        if part.status:
            self._slot_read(Join(request, 1), slot, block, part)
        else:
            request.status = 0
            self._back.append(request)

    def _slot_read(self, join: Join, slot: int, block: int, part: Part) -> None:
        status = part.status
        if status and self.destage.dirty.get(block, (-1, 0.0))[0] == slot:
            status = CACHE_LOST
        elif status:
            if self.map.find(block) == slot:  # by now the block may be in another slot, and dirty
                self.map.drop(block, block)
            status = _AGAIN
        self._read_done(join, status)

    def _read_done(self, join: Join, status: int) -> None:
        join.left -= 1
        join.status = join.status or status
        if not join.left:
            if join.status == _AGAIN:
                self.read(join.request)
            else:
                self._end(join.request, join.status)

    def _miss(self, request: Request, first: int, last: int) -> None:
        """Read from below: whole blocks if they are to be stored in FILE, otherwise only the request."""
        if self.is_shunned or last >= self._whole or not self._may_keep(request, 2):
            done = partial(self._passed, request)
            self.send_below(Op.READ, request.offset, request.iov, request.length, done)
            return
        start, length = first << self._bits, (last + 1 - first) << self._bits
        memory, copy = self._copies.take(length), self._overtaken.copy(first, last)
        left = Join(request, 1)

        def kept(slot: int, block: int, part: Part | None) -> None:
            if part is not None and not part.status and not copy.is_old:
                self.map.put(slot, block)
            left.left -= 1
            if not left.left:
                self._overtaken.forget(copy)
                self._copies.put(memory)

        def read(part: Part) -> None:
            if not part.status:
                give(request.iov, memory, request.offset - start)
            self._end(request, part.status)
            for block in range(first, last + 1) if not (part.status or copy.is_old) else ():
                if self.map.find(block) < 0 and (slot := self.map.take(block)) >= 0:
                    left.left += 1
                    at = (block - first) << self._bits
                    self.send_to_slot(Op.WRITE, slot, 0, [memory[at : at + self.block]], partial(kept, slot, block))
                    self.map.pins[slot] -= 1  # the pin of `take`; `send_to_slot` has its own
            kept(-1, -1, None)

        self.send_below(Op.READ, start, [memory[:length]], length, read)

    def _passed(self, request: Request, part: Part) -> None:
        self._end(request, part.status)

    def _may_keep(self, request: Request, blocks: int) -> bool:
        return request.length <= MOST and self._copies.have_room(MOST + blocks * self.block)

    def _blocks(self, request: Request) -> tuple[int, int]:
        return request.offset >> self._bits, (request.offset + request.length - 1) >> self._bits
