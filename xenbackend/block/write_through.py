"""The requests of a cache whose writes are all answered by the layer below, so that losing FILE costs only speed.

Must not read a block from FILE that is older than the one in the layer below.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xenbackend.block.cache_map import CacheMap
from xenbackend.block.cache_parts import MOST, PATIENCE, Own
from xenbackend.block.copies import Copies, fill, give
from xenbackend.block.formats.cache import DATA_AT
from xenbackend.block.mapped.parts import Join, cut
from xenbackend.block.overtaken import Overtaken
from xenbackend.block.request import PENDING, Op, Request

if TYPE_CHECKING:
    from xenbackend.block.driver import Filter, HostFile


class WriteThrough:
    """The requests of one disk. `map` is None if FILE is not used."""

    def __init__(
        self, driver: Filter, file: HostFile | None, known: CacheMap | None, block: int, *, keeps_writes: bool
    ) -> None:
        """Begin with `known`, the map of FILE. Without file and map all requests bypass FILE. `block` is in bytes."""
        assert driver.below is not None  # noqa: S101 - as in `Filter.open`
        self._driver, self._env, self._file, self.map = driver, driver.env, file, known
        self._size, self._block, self._keeps_writes = driver.below.size, block, keeps_writes
        self._bits = block.bit_length() - 1
        self._copies = Copies()
        self._overtaken = Overtaken()
        self._free: list[Own] = []  # read requests to FILE that can be reused
        self._done_read = self._was_read
        self._down: list[Request] = []
        self._to_file: list[Request] = []
        self._back: list[Request] = []
        self._hits = self._misses = self._errors = self._in_a_row = self._at_file = 0
        if file is not None:
            file.complete = self._from_file

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does: read hits from FILE, pass on the rest, and store in FILE what comes back."""
        if self.map is not None:
            done, late, batch = self._file.read_mapped(batch, self.map.places)  # type: ignore[union-attr]  # there is a map
            self._hits += len(done) + len(late)
            if done:
                self._in_a_row = 0
                if not (late or batch):  # the common case
                    self._driver.complete(done)
                    return
                self._back += done
            for request, place in late:
                self._read_from(request, place - DATA_AT >> self._bits, place, request.length, request.iov)
        for request in batch:
            if request.op == Op.READ and self.map is not None:
                self._read(request, self.map)
            elif request.op in (Op.WRITE, Op.DISCARD):
                self._alter(request)
            else:
                self._down.append(request)
        self._pass_on()

    def take_back(self, batch: list[Request]) -> None:
        """Continue with requests that the layer below gives back."""
        for request in batch:
            if type(request) is Own and request.cache is self:
                request.done(request)
            else:
                if request.op in (Op.WRITE, Op.DISCARD):
                    self._overtaken.end(*self._blocks(request))
                self._back.append(request)
        self._pass_on()

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return {"hits": self._hits, "misses": self._misses, "errors": self._errors}

    def close(self) -> None:
        """Wait for requests to FILE, and release the memory."""
        self._env.wait_for(lambda: not self._at_file)  # a late write could hit a slot that a successor has reassigned
        if self.map is not None:
            self.map.close()

    def _from_file(self, batch: list[Request]) -> None:
        """Continue with requests that FILE gives back."""
        self._at_file -= len(batch)
        known, reading = self.map, self._done_read
        for own in batch:
            request = own.tag
            if own.status or known is None or own.done is not reading or type(request) is Join:  # type: ignore[attr-defined]  # nothing else is sent there
                own.done(own)  # type: ignore[attr-defined]  # the same
                continue
            known.pins[own.block] -= 1  # type: ignore[attr-defined]  # from here on as in `_was_read`, without its call
            own.tag, own.iov = None, ()
            request.status = 0
            self._free.append(own)  # type: ignore[arg-type]  # the same
            self._back.append(request)
            self._in_a_row = 0
        self._pass_on()

    def _pass_on(self) -> None:
        """Send the collected requests: to the layer below, to FILE, and back to the layer above."""
        if self._down:
            down, self._down = self._down, []
            self._driver.next.submit(down)  # type: ignore[union-attr]  # a filter in a chain has a layer below
        if self._to_file:
            to_file, self._to_file = self._to_file, []
            self._at_file += len(to_file)
            self._file.submit(to_file)  # type: ignore[union-attr]  # there is a map, or was when these were made
        if self._back:
            back, self._back = self._back, []
            self._driver.complete(back)

    def _blocks(self, request: Request) -> tuple[int, int]:
        return request.offset >> self._bits, (request.offset + request.length - 1) >> self._bits

    # reads

    def _read(self, request: Request, known: CacheMap) -> None:
        bits, offset = self._bits, request.offset
        first, last = offset >> bits, (offset + request.length - 1) >> bits
        slot = known.find(first)
        if slot >= 0 and first == last:
            self._hits += 1
            place = DATA_AT + (slot << bits) + (offset & (self._block - 1))
            self._read_from(request, slot, place, request.length, request.iov)
            return
        slots = [slot, *map(known.find, range(first + 1, last + 1))]
        if -1 in slots:
            self._miss(request, first, last)
            return
        self._hits += 1
        pieces, at = Join(request, len(slots)), offset & (self._block - 1)
        lengths = [self._block - at, *[self._block] * (len(slots) - 2)]
        lengths.append(request.length - sum(lengths))
        for slot, length, iov in zip(slots, lengths, cut(request.iov, lengths), strict=True):
            self._read_from(pieces, slot, DATA_AT + (slot << bits) + at, length, iov)
            at = 0

    def _read_from(self, tag: Request | Join, slot: int, place: int, length: int, iov: Sequence[memoryview]) -> None:
        """Read a part of a slot, which is pinned until the read has ended."""
        self.map.pins[slot] += 1  # type: ignore[union-attr]  # the slot was found in it
        own = self._free.pop() if self._free else Own()
        own.offset, own.length, own.iov = place, length, iov
        own.op, own.status, own.done, own.tag, own.block = Op.READ, PENDING, self._done_read, tag, slot
        self._to_file.append(own)

    def _was_read(self, own: Own) -> None:
        request, status = own.tag, own.status
        if self.map is not None:
            self.map.pins[own.block] -= 1
        own.tag, own.iov = None, ()
        self._free.append(own)
        if type(request) is Join:
            request.status, request.left = max(request.status, status), request.left - 1
            if request.left:
                return
            request, status = request.request, request.status
        if status:
            self._drop(*self._blocks(request))
            self._failed(status)
            self._down.append(request)  # the layer below has everything
        else:
            self._in_a_row = 0
            request.status = 0
            self._back.append(request)

    def _miss(self, request: Request, first: int, last: int) -> None:
        """Read whole blocks from below, to be stored in FILE, or only the request if it is large or room is short."""
        self._misses += 1
        if request.length > MOST or not self._copies.have_room(MOST + 2 * self._block):
            self._down.append(request)
            return
        start = first << self._bits
        own = Own.make(self, Op.READ, start, min((last + 1) << self._bits, self._size) - start, self._missed)
        self._take_copy(own, request, first, last)
        self._down.append(own)

    def _take_copy(self, own: Own, request: Request, first: int, last: int) -> None:
        own.tag, own.slots, own.memory = request, {}, self._copies.take(own.length)
        own.iov = [own.memory[: own.length]]
        own.copy = self._overtaken.copy(first, last)

    def _missed(self, own: Own) -> None:
        """Answer a read with the data from below, and store them in FILE."""
        request: Request = own.tag
        request.status = own.status
        if not own.status:
            give(request.iov, own.memory, request.offset - own.offset)
        self._back.append(request)
        self._keep(own)

    # writes and discards

    def _alter(self, request: Request) -> None:
        """Drop the blocks from the map, send the request, and with mode=writethrough store the data afterwards."""
        first, last = self._blocks(request)
        known, is_kept = self.map, self._keeps_writes and request.op == Op.WRITE
        if known is None or not is_kept or request.length > MOST or not self._copies.have_room(MOST):
            self._drop(first, last)
            self._overtaken.begin(first, last)
            self._down.append(request)
            return
        own = Own.make(self, Op.WRITE, request.offset, request.length, self._written)
        self._take_copy(own, request, first, last)
        was_old = own.copy.is_old
        fill(own.memory, 0, request.iov)  # the guest may alter its pages between the writes to the two media
        for block in {first, last}:
            slot = known.find(block)
            if slot >= 0:  # if the write covers only a part of the block, the rest in the slot stays valid
                known.pins[slot] += 1
                own.slots[block] = slot
        self._drop(first, last)
        self._overtaken.begin(first, last)
        own.copy.is_old = was_old  # `begin` has marked this write's own copy as well
        self._down.append(own)

    def _written(self, own: Own) -> None:
        """Give back a write that the layer below has executed, and store its data in FILE."""
        request: Request = own.tag
        self._overtaken.end(*self._blocks(request))
        request.status = own.status
        self._back.append(request)
        self._keep(own)

    def _drop(self, first: int, last: int) -> None:
        if self.map is None:
            return
        if self._overtaken.is_wide(first, last):
            self.map.clear()
        else:
            self.map.drop(first, last)

    # storing in FILE

    def _keep(self, own: Own) -> None:
        """Write the data of a request into slots, unless it failed or its copy is old."""
        known, begun, own.left = self.map, own.slots, 0
        own.slots = {}
        if known is not None and not own.status and not own.copy.is_old:
            for block in range(own.copy.first, own.copy.last + 1):
                self._keep_block(own, block, begun.pop(block, -1), known)
        for slot in begun.values() if known is not None else ():
            known.pins[slot] -= 1  # type: ignore[union-attr]  # as above
        if not own.left:
            self._forget(own)

    def _keep_block(self, own: Own, block: int, slot: int, known: CacheMap) -> None:
        """Write the request's data of a block into `slot`; if that is -1, take a slot, but only for a whole block."""
        begin, end = block << self._bits, min((block + 1) << self._bits, self._size)
        start, stop = max(begin, own.offset), min(end, own.offset + own.length)
        if slot < 0 and (start, stop) == (begin, end) and known.find(block) < 0:
            slot = known.take(block)
        if slot < 0:
            return
        part = Own.make(self, Op.WRITE, DATA_AT + slot * self._block + start - begin, stop - start, self._kept)
        part.iov, part.tag, part.block = [own.memory[start - own.offset : stop - own.offset]], own, block
        own.slots[block] = slot
        own.left += 1
        self._to_file.append(part)

    def _kept(self, part: Own) -> None:
        own: Own = part.tag
        if self.map is not None:
            slot = own.slots[part.block]
            if not part.status and not own.copy.is_old:
                self.map.put(slot, part.block)
            self.map.pins[slot] -= 1
        if part.status:
            self._failed(part.status)
        own.left -= 1
        if not own.left:
            self._forget(own)

    def _forget(self, own: Own) -> None:
        self._overtaken.forget(own.copy)
        self._copies.put(own.memory)

    def _failed(self, status: int) -> None:
        """Count an error of FILE. Errors of a full file system do not count towards giving up FILE."""
        self._errors += 1
        self._in_a_row += status not in (errno.ENOSPC, errno.EDQUOT)
        if self._in_a_row >= PATIENCE and self.map is not None:
            self.leave_alone(os.strerror(status))

    def leave_alone(self, why: str) -> None:
        """Serve without FILE from now on, and clear the map so that a successor does not use its content."""
        if self.map is not None:
            self.map.clear()
            self.map.close()
            self.map = None
        self._env.report("cache", f"off: {why}")
