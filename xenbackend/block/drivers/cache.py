"""cache: keeps blocks of the layer below in a file on a faster device.

Synopsis:
    cache:FILE,size=SIZE[,mode=read|writethrough|writeback][,block=SIZE][,destage=SIZE]

Description:
    What the guest reads from a slow layer, such as an image on NFS, a disk on a server or on rotating media, is kept in
    FILE, and read from there the next time. FILE is on a faster medium, and has room for `size` bytes; it is made where
    it is not there.

    With mode=read (the default) it has what was read. With mode=writethrough also what was written, once that is
    below, in whole blocks or to blocks that it had: for a guest that reads again soon what it wrote. Every write is
    answered by the layer below, in both modes, and a flush flushes that.

    With mode=writeback a write of up to 128 KiB is answered once it is in FILE, and goes below later. FILE is a part of
    the disk then: what is dirty is nowhere else, and lost with FILE.

    `cache=on` of `aio:` has the host's memory do the same; this layer is for more than that has room for.

Behaviour:
    The cache is empty when the disk is attached, and filled by use. What it has is known in memory that outlives the
    worker: kills, upgrades and restarts of the service lose none of it. It is known nowhere else, but for what is
    dirty, so that no block of a former life can come back after a power failure, or after others have written.

    A read of up to 128 KiB that finds one of its blocks missing reads whole blocks from below, and leaves them in the
    cache, unless something was written there meanwhile; with writeback only where all of them are missing. Larger ones,
    as of a backup, go by. Where no place is free, a block gives way that was not used since the last time that one was
    looked for near it.

    With mode=read or writethrough FILE is never needed: a block that cannot be read from it is read from below. After
    16 errors in a row it is left alone until the layer is opened anew, and the fact `cache` says so; where a successor
    cannot open it, none is used.

    With writeback, a flush makes FILE durable, then notes there which blocks are dirty, and flushes what went below. A
    block goes there 5 s after it was written, or earlier where half of those are dirty that may be, at `destage` bytes
    a second; the layer below is flushed before FILE forgets it. So after a power failure each sector is as it was at
    the last flush, or newer. Where FILE gives errors, what it alone has waits, whatever the policy says, and all else
    goes past it. Where the layer below does, the fact `destage` says so. Closing the disk takes up to 5 s for what is
    dirty, as do `set` and `upgrade`; the rest stays in FILE, durably, and the service's log says so. While something is
    dirty, FILE is refused above another layer, or an image that was changed without it.

    `xenbackend status --json` shows `hits` and `misses`, in requests to read, and `errors` of FILE; with writeback also
    how many blocks are `dirty`, how many were `destaged`, and how many pieces of writes went `around` FILE.

Example:
    cache:/ssd/guest.cache,size=4G|aio:/mnt/nfs/guest.img
    cache:/ssd/guest.cache,size=20G,mode=writethrough|nbd:unix:/run/server.sock
    cache:/ssd/guest.cache,size=20G,mode=writeback,destage=50M|aio:/mnt/nfs/guest.img

Limits:
    FILE must be a regular file, for one disk at a time. Commands, and `check`, read past it, but with writeback. `size`
    is 1 MiB and 8 blocks at least, and 16 million blocks at most; a slot takes 13 bytes of memory, with writeback 21.
    Above `luks:` FILE has plain text. What others write to a shared image (`share=on`, `w!`) is not noticed: do not use
    it there. A discard of more than 4096 blocks empties the cache of what is not dirty. A medium below FILE that hangs,
    rather than failing, holds up what is read from it.

    With writeback the image alone is not the disk until nothing is dirty, and nobody is kept from using it. At most
    65536 blocks are, and 3/4 of FILE. `snapshot` is refused. For another mode take another FILE, with nothing dirty.

    A hit of 4096 bytes costs 1.3 us more than a read without this layer in batches of 32, and 1.9 us alone; a write 2.8
    us more, 7.7 us with mode=writethrough, and 6.8 us with writeback.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from xenbackend.block.below import describe
from xenbackend.block.cache_file import open_back, open_read
from xenbackend.block.cache_map import CacheMap
from xenbackend.block.cache_parts import MODES, READ, WRITEBACK, WRITETHROUGH, Own, check_sizes, parse_mode
from xenbackend.block.copies import Copies, fill, give
from xenbackend.block.driver import Env, File, Filter, Geometry
from xenbackend.block.formats.cache import DATA_AT
from xenbackend.block.mapped.parts import Join, cut
from xenbackend.block.options import Kind, RecordPath, Size, option
from xenbackend.block.overtaken import Overtaken
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.block.write_back import WriteBack
from xenbackend.errors import DriverError
from xenbackend.units import format_size

_MOST = 128 << 10  # bytes of a request that is kept
_PATIENCE = 16  # errors of FILE, one after the other


class Cache(Filter):
    """See the head of this file."""

    name = "cache"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `cache:`."""

        file: RecordPath = option("where blocks are kept", target=True)
        size: Size = option("bytes that there is room for")
        mode: Annotated[str, Kind(" or ".join(MODES), parse_mode)] = option(
            "whether what is written is kept, too, or even alone", default=READ
        )
        block: Size = option("bytes of a block, a power of two", default=16 << 10)
        destage: Size = option("with writeback: bytes a second that are written below at most; 0: any", default=0)

        def __post_init__(self) -> None:
            check_sizes(self.size, self.block)
            if self.destage and self.mode != WRITEBACK:
                raise ValueError("destage does nothing without mode=writeback")

    options: Options
    _file: File | None = None
    _map: CacheMap | None = None  # None: FILE is left alone
    _writer: WriteBack | None = None  # with mode=writeback it does all

    def __init__(self, options: Options) -> None:
        """See `Driver`."""
        super().__init__(options)
        self.may_answer_alone = options.mode == WRITEBACK
        self.is_transparent = not self.may_answer_alone

    def open(self, env: Env) -> Geometry:
        """Open FILE, or make it. Raises: DriverError, OSError."""
        geometry = super().open(env)
        self._size, self._block = geometry.size, self.options.block
        self._bits = self._block.bit_length() - 1
        self._copies = Copies()
        self._overtaken = Overtaken()
        self._free: list[Own] = []  # reads from FILE that may be used again
        self._done_read = self._was_read
        self._down: list[Request] = []
        self._to_file: list[Request] = []
        self._back: list[Request] = []
        self._hits = self._misses = self._errors = self._in_a_row = self._at_file = 0
        if self.options.mode == WRITEBACK:
            return self._open_back(env, geometry)
        if env.serves:
            try:
                self._open_file(env)
            except (DriverError, OSError) as problem:
                if not env.resumes:
                    raise
                self._map = CacheMap(env, self.options.size // self._block, b"")  # nothing that comes is noted there
                self._leave_alone(str(problem))
        return geometry

    def _open_back(self, env: Env, geometry: Geometry) -> Geometry:
        """Open FILE, also for whoever only looks: it may have what is nowhere else. Raises: DriverError, OSError."""
        options = self.options
        self._file, header = open_back(self, options.file, options.size, options.block)
        self._file.complete = self.on_complete
        if header is not None:
            self._writer = WriteBack(self, self._file, header, rate=options.destage)
            dirty = self._writer.figures()["dirty"]
            env.report("mode", self._file.mode)
            env.report("cache", f"{format_size(header.size)}; {dirty} blocks were in FILE alone when it was opened")
        physical = max(geometry.physical_sector_size, self._file.physical_sector_size)
        return replace(geometry, can_flush=True, physical_sector_size=physical)

    def _open_file(self, env: Env) -> None:
        """Open FILE, and what was known of it. Raises: DriverError, OSError."""
        file, header = open_read(self, self.options.file, self.options.size, self._block)
        self._file = file
        file.complete = self._from_file
        cut = self._size % self._block and self._size  # its last block is another one once the disk has grown
        base = f"{describe(self.next, env.files, with_changes=False)} {cut}".encode(errors="surrogateescape")
        self._map = CacheMap(env, header.blocks, header.token + hashlib.sha256(base).digest())
        env.report("mode", file.mode)
        env.report("cache", f"{format_size(self._map.slots * self._block)} in blocks of {format_size(self._block)}")

    def submit(self, batch: list[Request]) -> None:
        """Read from FILE what is there, pass on the rest, and keep what comes back."""
        if self._writer is not None:
            self._writer.submit(batch)
            return
        for request in batch:
            if request.op == Op.READ and self._map is not None:
                self._read(request, self._map)
            elif request.op in (Op.WRITE, Op.DISCARD):
                self._alter(request)
            else:
                self._down.append(request)
        self._pass_on()

    def on_complete(self, batch: list[Request]) -> None:
        """Go on with what the layer below gives back, or FILE with mode=writeback."""
        if self._writer is not None:
            self._writer.take_back(batch)
            return
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
        if self._writer is not None:
            return self._writer.figures()
        return {"hits": self._hits, "misses": self._misses, "errors": self._errors}

    def close(self) -> None:
        """Let go of FILE. Raises: OSError."""
        self.env.wait_for(lambda: not self._at_file)  # or it would land in a slot that another chain has given away
        try:
            if self._writer is not None:
                self._writer.close()
            if self._map is not None:
                self._map.close()
        finally:
            if self._file is not None:
                self._file.close()

    def _from_file(self, batch: list[Request]) -> None:
        """Go on with what FILE gives back."""
        self._at_file -= len(batch)
        for own in batch:
            own.done(own)  # type: ignore[attr-defined]  # nothing else is sent there
        self._pass_on()

    def _pass_on(self) -> None:
        """Send down, to FILE and up what has come together meanwhile."""
        if self._down:
            down, self._down = self._down, []
            self.next.submit(down)  # type: ignore[union-attr]  # a filter in a chain has a layer below
        if self._to_file:
            to_file, self._to_file = self._to_file, []
            self._at_file += len(to_file)
            self._file.submit(to_file)  # type: ignore[union-attr]  # there is a map, or was when these were made
        if self._back:
            back, self._back = self._back, []
            self.complete(back)

    def _blocks(self, request: Request) -> tuple[int, int]:
        return request.offset >> self._bits, (request.offset + request.length - 1) >> self._bits

    # reads

    def _read(self, request: Request, known: CacheMap) -> None:
        bits, offset = self._bits, request.offset
        first, last = offset >> bits, (offset + request.length - 1) >> bits
        slot = known.find(first)
        if slot >= 0 and first == last:
            self._hits += 1
            self._read_slot(request, slot, offset & (self._block - 1), request.length, request.iov, known)
            return
        slots = [slot, *map(known.find, range(first + 1, last + 1))]
        if -1 in slots:
            self._miss(request, first, last)
            return
        self._hits += 1
        pieces, at = Join(request, len(slots)), offset & (self._block - 1)
        lengths = [self._block - at, *[self._block] * (len(slots) - 2)]
        lengths.append(request.length - sum(lengths))
        for place, length, iov in zip(slots, lengths, cut(request.iov, lengths), strict=True):
            self._read_slot(pieces, place, at, length, iov, known)
            at = 0

    def _read_slot(
        self, tag: Request | Join, slot: int, at: int, length: int, iov: Sequence[memoryview], known: CacheMap
    ) -> None:
        """Read a part of a slot, which stays as it is until that is done."""
        known.pins[slot] += 1
        own = self._free.pop() if self._free else Own()
        own.offset, own.length, own.iov = DATA_AT + (slot << self._bits) + at, length, iov
        own.op, own.status, own.done, own.tag, own.block = Op.READ, PENDING, self._done_read, tag, slot
        self._to_file.append(own)

    def _was_read(self, own: Own) -> None:
        request, status = own.tag, own.status
        if self._map is not None:
            self._map.pins[own.block] -= 1
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
            self._down.append(request)  # nothing need be in FILE
        else:
            self._in_a_row = 0
            request.status = 0
            self._back.append(request)

    def _miss(self, request: Request, first: int, last: int) -> None:
        """Read whole blocks from below."""
        self._misses += 1
        if request.length > _MOST or not self._copies.have_room(_MOST + 2 * self._block):
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
        """Give back what was read from below, and keep it."""
        request: Request = own.tag
        request.status = own.status
        if not own.status:
            give(request.iov, own.memory, request.offset - own.offset)
        self._back.append(request)
        self._keep(own)

    # what is written

    def _alter(self, request: Request) -> None:
        """Have the cache know nothing of what is altered, before it is sent; and perhaps keep it afterwards."""
        first, last = self._blocks(request)
        known, is_kept = self._map, self.options.mode == WRITETHROUGH and request.op == Op.WRITE
        if known is None or not is_kept or request.length > _MOST or not self._copies.have_room(_MOST):
            self._drop(first, last)
            self._overtaken.begin(first, last)
            self._down.append(request)
            return
        own = Own.make(self, Op.WRITE, request.offset, request.length, self._written)
        self._take_copy(own, request, first, last)
        was_old = own.copy.is_old
        fill(own.memory, 0, request.iov)  # the guest may alter its pages between the one medium and the other
        for block in {first, last}:
            slot = known.find(block)
            if slot >= 0:  # what it has around a write to a part of it stays true
                known.pins[slot] += 1
                own.slots[block] = slot
        self._drop(first, last)
        self._overtaken.begin(first, last)
        own.copy.is_old = was_old  # it is no older than itself
        self._down.append(own)

    def _written(self, own: Own) -> None:
        """Give back what was written below, and keep it."""
        request: Request = own.tag
        self._overtaken.end(*self._blocks(request))
        request.status = own.status
        self._back.append(request)
        self._keep(own)

    def _drop(self, first: int, last: int) -> None:
        if self._map is None:
            return
        if self._overtaken.is_wide(first, last):
            self._map.clear()
        else:
            self._map.drop(first, last)

    # what is kept

    def _keep(self, own: Own) -> None:
        """Write what was read or written into slots, unless that failed, or is old."""
        known, begun, own.left = self._map, own.slots, 0
        own.slots = {}
        if known is not None and not own.status and not own.copy.is_old:
            for block in range(own.copy.first, own.copy.last + 1):
                self._keep_block(own, block, begun.pop(block, -1), known)
        for slot in begun.values() if known is not None else ():
            known.pins[slot] -= 1  # type: ignore[union-attr]  # as above
        if not own.left:
            self._forget(own)

    def _keep_block(self, own: Own, block: int, slot: int, known: CacheMap) -> None:
        """Write what there is of a block into `slot`, or all of it into another one."""
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
        if self._map is not None:
            slot = own.slots[part.block]
            if not part.status and not own.copy.is_old:
                self._map.put(slot, part.block)
            self._map.pins[slot] -= 1
        if part.status:
            self._failed(part.status)
        own.left -= 1
        if not own.left:
            self._forget(own)

    def _forget(self, own: Own) -> None:
        self._overtaken.forget(own.copy)
        self._copies.put(own.memory)

    def _failed(self, status: int) -> None:
        """Count an error of FILE; one that is full takes what there is room for."""
        self._errors += 1
        self._in_a_row += status not in (errno.ENOSPC, errno.EDQUOT)
        if self._in_a_row >= _PATIENCE and self._map is not None:
            self._leave_alone(os.strerror(status))

    def _leave_alone(self, why: str) -> None:
        """Serve without FILE from now on, and leave a successor nothing of what it has."""
        if self._map is not None:
            self._map.clear()
            self._map.close()
            self._map = None
        self.env.report("cache", f"off: {why}")
