"""checksum: detects blocks whose content is not what was written.

Synopsis:
    checksum:FILE[,block=SIZE]

Description:
    Media lose bits, cables and controllers alter them, and writes land in wrong places, without any error. This layer
    keeps a checksum of each block of the layer below in FILE, and compares it with each block that is read: a block
    that does not match is an error, and never data. FILE is created if it does not exist or is empty.

    The layer cannot repair a wrong block: restore it from a backup. dm-integrity does the same for a block device that
    was formatted for it; this layer needs nothing of what is below, and can be put over a disk that already has data.

Behaviour:
    A block whose sum is not known gets one when it is written or first read: the data from before this layer are
    accepted as they are. A read of a block with a wrong sum ends with EILSEQ (the policy for reads applies: by default
    three more tries), and so does a write to a part of it. A write to all of it, or a discard, makes it valid again.

    Data are copied before their sum is computed, on reads and writes, since a guest may alter its pages meanwhile. A
    write to parts of blocks reads the rest of them first; the guest is told the block size as the physical sector size.

    No crash of a worker, the service or the host makes a sound block look rotten. Before the first write to one of
    1024 blocks that share a page of sums, a log in FILE marks that page as in doubt; the mark is removed when data and
    sums are durable, and nothing was written there for five seconds. After a power failure the sums in doubt are
    forgotten, and made anew by the next read. A killed worker's successor has all sums, also in a new service.

    FILE remembers which image is below, and the chain is refused over another one. If the image was changed after
    FILE was closed, or if `set` inserts this layer below a running guest, all sums are forgotten, and `status` says so.

    `xenbackend status --json` shows how many blocks were `verified`, how many were `learned` (accepted as they were),
    and how many are `rotten`; the fact `rot` says where the first of those are.

Example:
    checksum:/srv/sums/guest.sums|aio:/srv/images/guest.img
    log:|checksum:/srv/sums/guest.sums,block=64K|qcow2:/mnt/nfs/guest.qcow2

Limits:
    A block has 4 KiB, like those of most guests' file systems, or a larger power of two up to 1 MiB. Sums take 1 MiB of
    memory, and of FILE, for each GiB of disk in blocks of 4 KiB, and never more than 1 GiB. They are CRC-32: one in 4
    billion damaged blocks goes undetected, and they do not stop anybody who alters a block on purpose. A change of the
    image within ten seconds after FILE was closed, or at any time if it is a block device, goes unnoticed, and counts
    as rot. The layer below cannot grow while FILE is kept. A read of 4096 bytes costs 5.8 us more than without this
    layer, in batches of 32 and alone, and 2 us for each further block; a write costs 9.6 us more.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from xenbackend.block.below import changed_ns, describe
from xenbackend.block.beside import begin, check_block, have, is_new
from xenbackend.block.copies import Copies, fill, give
from xenbackend.block.driver import Env, File, Filter, Geometry
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.checksum import PAGE, Header, sum_of
from xenbackend.block.holds import Holds
from xenbackend.block.options import RecordPath, Size, option
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.block.sums import Done, Sums
from xenbackend.errors import DriverError
from xenbackend.units import format_size

_MAX_SUMS = 1 << 30  # bytes
_CLOSING_NS = 10 * 10**9  # after we close FILE the layers below may write for that long, as they are closed later
_TRIES = 3  # of a read during which a write may have altered the block
_TOLD = 8  # rotten blocks that are reported one by one


class _Own(Request):
    """A request of this layer's own, on behalf of one from above. `done` is called with it when it comes back.

    first, last   the blocks that it covers
    memory        the copy of their data, from the beginning of `first` on
    known         their sums: for a read those at its start, for a write those of the new data
    epoch         for a read: `Sums.epoch` of the blocks at its start
    left          for a write the number of edge blocks still to be read, for a read the number of tries so far
    """

    __slots__ = ("done", "epoch", "first", "known", "last", "left", "memory")

    done: Callable[[_Own], None]
    first: int
    last: int
    memory: memoryview
    known: list[int]
    epoch: int
    left: int


class Checksum(Filter):
    """See the head of this file."""

    name = "checksum"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `checksum:`."""

        file: RecordPath = option("where the sums are", target=True)
        block: Size = option("bytes of a block, a power of two; only for a new FILE", default=4096)

        def __post_init__(self) -> None:
            check_block(self.block)

    options: Options
    _file: File | None = None
    _sums: Sums

    def open(self, env: Env) -> Geometry:
        """Open FILE, or initialise it. Raises: DriverError, OSError."""
        geometry = super().open(env)
        file, changed_at = have(env, self.options.file, read_only=env.read_only)
        self._file = file
        header = self._begin_file(file)
        self._size, self._block, self._bits = header.size, header.block, header.block.bit_length() - 1
        file.complete = self._from_file
        self._sums = Sums(env, file, header, self._flush_below)
        self._forget_others(changed_at)
        self._down: list[Request] = []
        self._back: list[Request] = []
        self._copies = Copies()
        self._waiting: deque[Request] = deque()  # for room for a copy
        self._holds = Holds()
        self._rotten: set[int] = set()
        self._verified = self._learned = 0
        self._can_discard = geometry.can_discard
        env.report("mode", file.mode)
        return replace(geometry, physical_sector_size=max(geometry.physical_sector_size, header.block))

    def _begin_file(self, file: File) -> Header:
        """Return the header of FILE, initialising FILE if it is new. Raises: DriverError, OSError."""
        assert self.below is not None  # noqa: S101 - as in `Filter.open`
        base = describe(self.next, self.env.files, with_changes=False)
        wanted = Header(self.below.size, self.options.block, base, os.urandom(16))
        first = file.read_at(0, HEADER_SIZE)
        if not is_new(file, first, wanted.file_size):
            found = Header.parse(first)
            if (found.size, found.base) != (wanted.size, wanted.base):
                raise DriverError(
                    f"{self.options.file} has the sums of another disk, of {found.size} bytes; name another file, or "
                    "remove this one, and all sums are made again"
                )
            if file.size < found.file_size:
                raise DriverError(f"it has only {file.size} of its {found.file_size} bytes: it has been truncated")
            wanted = found
        elif not self.env.read_only:
            begin(file, wanted, size=wanted.file_size, written=wanted.sums_at)
        if wanted.pages * PAGE > _MAX_SUMS:
            raise DriverError(f"blocks of {format_size(wanted.block)} need too many sums; give a larger block=")
        return wanted

    def _forget_others(self, closed_ns: int) -> None:
        """Forget all sums if the image was, or may have been, changed without this layer since FILE was closed."""
        if self._sums.is_left:
            return
        is_changed = changed_ns(self.next, self.env.files) > closed_ns + _CLOSING_NS
        if self.env.resumes or (is_changed and not self._sums.is_in_doubt):
            self._sums.forget()
            self.env.report("sums", "made again: the image was changed without this layer")

    def submit(self, batch: list[Request]) -> None:
        """Take requests; a request of our own goes down for each of them."""
        for request in batch:
            if request.op == Op.FLUSH:
                own = self._own(Op.FLUSH, 0, 0, self._flushed)
                own.tag, own.known = (request, self._sums.flushing()), []
                self._down.append(own)
            elif request.op == Op.DISCARD and not self._can_discard:
                self._end(request, errno.EOPNOTSUPP)
            else:
                self._admit(request)
        self._pass_on()

    def on_complete(self, batch: list[Request]) -> None:
        """Continue with requests that the layer below gives back."""
        for own in batch:
            own.done(own)  # type: ignore[attr-defined]  # only requests of our own are sent down
        self._pass_on()

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return {"rotten": len(self._rotten), "verified": self._verified, "learned": self._learned}

    def close(self) -> None:
        """Write the sums to FILE, and close it. Raises: OSError."""
        try:
            if hasattr(self, "_sums"):
                self._sums.close(writes=not self.env.read_only)
        finally:
            if self._file is not None:
                self._file.close()

    def _from_file(self, batch: list[Request]) -> None:
        """Continue with requests that FILE gives back."""
        for part in batch:
            self._sums.take(part)  # type: ignore[arg-type]  # only parts are sent there
        self._pass_on()

    def _pass_on(self) -> None:
        """Send down, and give back, the requests that have been collected meanwhile."""
        if self._down:
            down, self._down = self._down, []
            self.next.submit(down)  # type: ignore[union-attr]  # a filter in a chain has a layer below
        if self._back:
            back, self._back = self._back, []
            self.complete(back)

    def _own(self, op: int, first: int, last: int, done: Callable[[_Own], None]) -> _Own:
        own = _Own()
        own.op, own.first, own.last, own.done, own.left = op, first, last, done, 0
        own.status = PENDING
        return own

    def _end(self, request: Request, status: int) -> None:
        request.status = status
        self._back.append(request)

    def _admit(self, request: Request) -> None:
        """Begin a request, now or as soon as there is room for its copy."""
        if request.op != Op.DISCARD and (self._waiting or not self._has_room_for(request)):
            self._waiting.append(request)
        else:
            self._begin(request)

    def _has_room_for(self, request: Request) -> bool:
        return self._copies.have_room(request.length + 2 * self._block)

    def _begin(self, request: Request) -> None:
        """Begin a read, or a write or discard unless another one holds its blocks: then queue it behind that."""
        bits = self._bits
        first, last = request.offset >> bits, (request.offset + request.length - 1) >> bits
        if request.op == Op.READ:
            own = self._own(Op.READ, first, last, self._read)
            own.tag = request
            self._take_memory(own)
            self._send_read(own)
        elif (hold := self._holds.find(first, last)) is not None:
            hold.waiting.append(request)
        else:
            self._alter(request, first, last)

    def _alter(self, request: Request, first: int, last: int) -> None:
        """Begin a write or discard, which goes on as soon as its blocks are in doubt."""
        own = self._own(request.op, first, last, self._altered)
        own.tag = request
        self._holds.add(request.op, first, last)
        if request.op == Op.WRITE:
            self._take_memory(own)
        if self._sums.doubt(first, last, partial(self._doubted, own)):
            self._doubted(own, 0)

    def _doubted(self, own: _Own, status: int) -> None:
        request: Request = own.tag
        if status:
            self._let_go(own, status)
        elif own.op == Op.DISCARD:
            own.offset, own.length, own.iov = request.offset, request.length, ()
            self._sums.begin(own.first, own.last)
            self._down.append(own)
        else:
            edges = {own.first} if request.offset > own.offset else set()
            if request.offset + request.length < own.offset + own.length:
                edges.add(own.last)
            own.left = len(edges)
            for block in edges:
                self._read_edge(own, block)
            if not edges:
                self._write(own)

    def _read_edge(self, own: _Own, block: int) -> None:
        """Read a block that the write covers only in part."""
        edge = self._own(Op.READ, block, block, self._edge_read)
        edge.offset = block << self._bits
        edge.length = min(self._block, self._size - edge.offset)
        place = edge.offset - own.offset
        edge.memory = own.memory[place : place + edge.length]
        edge.iov, edge.tag = [edge.memory], own
        self._down.append(edge)

    def _edge_read(self, edge: _Own) -> None:
        own: _Own = edge.tag
        known = self._sums.values[edge.first]
        if not edge.status and known and sum_of(edge.memory, edge.first) != known:
            self._found(edge.first)
            edge.status = errno.EILSEQ
        own.status = max(own.status, edge.status)  # it begins as PENDING, which is less than 0
        own.left -= 1
        if own.left:
            return
        if own.status > 0:
            self._let_go(own, own.status)
        else:
            own.status = PENDING
            self._write(own)

    def _write(self, own: _Own) -> None:
        """Send down whole blocks; until they are back their sums count as unknown."""
        request: Request = own.tag
        memory, step = own.memory, self._block
        fill(memory, request.offset - own.offset, request.iov)
        places = range(0, own.length, step)
        own.known = [
            sum_of(memory[place : min(place + step, own.length)], block)
            for block, place in enumerate(places, own.first)
        ]
        self._sums.begin(own.first, own.last)
        self._down.append(own)

    def _altered(self, own: _Own) -> None:
        if not own.status and own.op == Op.WRITE:
            self._sums.put(own.first, own.known)
        if not own.status and self._rotten:
            self._heal(own)
        self._let_go(own, own.status)

    def _heal(self, own: _Own) -> None:
        """Remove from the rotten blocks those that were just altered as a whole."""
        left = {block for block in self._rotten if not own.first <= block <= own.last}
        if len(left) < len(self._rotten):
            self._rotten = left
            self._tell()

    def _let_go(self, own: _Own, status: int) -> None:
        """Give back a write or discard, and begin the requests that waited for its blocks."""
        self._sums.end(own.first, own.last)
        waiting = self._holds.remove(own.op, own.first, own.last)
        if own.op == Op.WRITE:
            self._copies.put(own.memory)
        self._end(own.tag, status)
        self._begin_waiting(waiting)

    def _begin_waiting(self, waiting: list[Request]) -> None:
        for each in waiting:
            self._admit(each)
        while self._waiting and self._has_room_for(self._waiting[0]):
            self._begin(self._waiting.popleft())

    def _take_memory(self, own: _Own) -> None:
        own.offset = own.first << self._bits
        own.length = min((own.last + 1) << self._bits, self._size) - own.offset
        own.memory = self._copies.take(own.length)
        own.iov = [own.memory[: own.length]]
        own.left = 0

    def _send_read(self, own: _Own) -> None:
        first, last = own.first, own.last
        own.known = self._sums.values[first : last + 1].tolist()
        own.epoch = self._sums.epoch(first, last)
        own.status = PENDING
        self._down.append(own)

    def _read(self, own: _Own) -> None:
        """Verify the data that were read, and give the request back."""
        request: Request = own.tag
        status = own.status or self._verify(own)
        if status < 0:
            self._send_read(own)
            return
        if not status:
            give(request.iov, own.memory, request.offset - own.offset)
        self._copies.put(own.memory)
        self._end(request, status)
        self._begin_waiting([])

    def _verify(self, own: _Own) -> int:
        """Return 0 if every block matches its sum, EILSEQ if one does not, -1 if a write interfered: read again."""
        memory, step, values = own.memory, self._block, self._sums.values
        is_same = self._sums.epoch(own.first, own.last) == own.epoch
        status = 0
        for block, known in enumerate(own.known, own.first):
            place = (block - own.first) * step
            if not known and not is_same:
                continue  # the data that were read may be older than those there now
            found = sum_of(memory[place : min(place + step, own.length)], block)
            if not known:
                if self._holds.find(block, block) is None:
                    self._learned += 1
                    self._sums.put(block, [found])
            elif found == known:
                self._verified += 1
            elif is_same or (values[block] == known and own.left >= _TRIES):
                self._found(block)
                status = errno.EILSEQ
            elif values[block] == known:
                own.left += 1
                return -1
        return status

    def _found(self, block: int) -> None:
        if block not in self._rotten:
            self._rotten.add(block)
            self._tell()

    def _tell(self) -> None:
        """Publish where the rotten blocks are; beyond _TOLD of them only when their number is a power of two."""
        count = len(self._rotten)
        if count > _TOLD and count & (count - 1):
            return
        places = ", ".join(str(block << self._bits) for block in sorted(self._rotten)[:_TOLD])
        self.env.report("rot", f"{count} blocks of {self._block} bytes, at {places}" if count else "none any more")

    def _flushed(self, own: _Own) -> None:
        request, flushed = own.tag
        if not own.status:
            flushed()
        self._end(request, own.status)

    def _flush_below(self, done: Done) -> None:
        """Flush the layer below on behalf of the sums, not of the guest."""
        assert self.below is not None  # noqa: S101 - as in `Filter.open`
        if not self.below.can_flush:
            done(0)
            return
        self.next.submit([self._own(Op.FLUSH, 0, 0, lambda own: done(own.status))])  # type: ignore[union-attr]  # as in `_pass_on`
