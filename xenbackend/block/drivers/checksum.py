"""checksum: finds blocks that are not as they were written.

Synopsis:
    checksum:FILE[,block=SIZE]

Description:
    Media lose bits, cables and controllers alter them, and writes land in wrong places, without any error. This layer
    keeps a sum of each block of the layer below in FILE, and compares it with each block that is read: what does not
    fit is an error, and never data. FILE is made where it is not there, or is empty.

    It cannot mend what is wrong: restore the blocks from a backup. dm-integrity does the same for a block device that
    was made for it; this layer needs nothing of what is below, and can be put over a disk that has data already.

Behaviour:
    A block whose sum is not known gets one when it is written, or first read: what was there before this layer is taken
    as it is. A block whose sum is wrong ends its read with EILSEQ, as the policy says for reads (three more tries by
    default), and so does a write to a part of it. A write to all of it, or a discard, puts it right.

    Data are copied before their sum is made, both ways, since a guest may alter its pages meanwhile. A write that
    covers no whole blocks reads the rest of them first; the guest is told of the block as its physical sector.

    No end of a worker, a service or the host makes rot of what is none. Before the first write to 1024 blocks, those of
    one page of sums, a log in FILE says that they are in doubt; it takes that back when their data and sums are both
    durable, and nothing was written there for five seconds. After a power failure the sums in doubt are forgotten, and
    made anew by the next read. A killed worker's successor, also of another service, has all of them.

    FILE remembers which image lies below, and the chain is refused over another one. Where the image was changed after
    FILE was closed, or `set` puts this layer in below a guest that runs, all sums are forgotten, and `status` says so.

    `xenbackend status --json` shows how many blocks were `verified`, `learned` (taken as they were) and are `rotten`;
    where the first ones are is the fact `rot`.

Example:
    checksum:/srv/sums/guest.sums|aio:/srv/images/guest.img
    log:|checksum:/srv/sums/guest.sums,block=64K|qcow2:/mnt/nfs/guest.qcow2

Limits:
    A block is as a guest's file system has it, 4 KiB, or a power of two up to 1 MiB. Sums take 1 MiB of memory, and of
    FILE, for each GiB of disk in blocks of 4 KiB, and never more than 1 GiB. They are CRC-32: of 4 billion damaged
    blocks one is not found, and nobody who wants to alter a block is kept from doing so unseen. A change of the image
    within ten seconds after FILE was closed, or of a block device, goes unnoticed, and is rot. The layer below cannot
    grow while FILE is kept. A read of 4096 bytes costs 5.8 us more than without this layer, in batches of 32 and alone,
    and 2 us for each further block; a write 9.6 us.
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
_CLOSING_NS = 10 * 10**9  # in which layers below may write when they are closed after us
_TRIES = 3  # of a read that a write may have met
_TOLD = 8  # rotten blocks that are told one by one


class _Own(Request):
    """A request of ours: for one from above, or on the way to it. `done` is called when it is back.

    first, last   blocks that it is about
    memory        what it is done with, from the beginning of the first one on
    known         their sums: of a read as it began, of a write as it ends
    epoch         of a read, as it began (`Sums.epoch`)
    left          what it waits for, or how often it was tried
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
        block: Size = option("bytes of a block, a power of two; of a new FILE only", default=4096)

        def __post_init__(self) -> None:
            check_block(self.block)

    options: Options
    _file: File | None = None
    _sums: Sums

    def open(self, env: Env) -> Geometry:
        """Open FILE, or begin it. Raises: DriverError, OSError."""
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
        """Return the header of FILE, which is begun where it is new. Raises: DriverError, OSError."""
        assert self.below is not None  # noqa: S101 - as in `Filter.open`
        base = describe(self.next, self.env.files, with_changes=False)
        wanted = Header(self.below.size, self.options.block, base, os.urandom(16))
        first = file.read_at(0, HEADER_SIZE)
        if not is_new(file, first, wanted.file_size):
            found = Header.parse(first)
            if (found.size, found.base) != (wanted.size, wanted.base):
                raise DriverError(
                    f"{self.options.file} has the sums of another disk, of {found.size} bytes; name another file, or "
                    "remove it, and all sums are made anew"
                )
            if file.size < found.file_size:
                raise DriverError(f"it has {file.size} bytes of {found.file_size}: something has cut it")
            wanted = found
        elif not self.env.read_only:
            begin(file, wanted, size=wanted.file_size, written=wanted.sums_at)
        if wanted.pages * PAGE > _MAX_SUMS:
            raise DriverError(f"blocks of {format_size(wanted.block)} have too many sums here; name a larger block=")
        return wanted

    def _forget_others(self, closed_ns: int) -> None:
        """Forget the sums of an image that was changed without this layer since, or below a running guest may be."""
        if self._sums.is_left:
            return
        is_changed = changed_ns(self.next, self.env.files) > closed_ns + _CLOSING_NS
        if self.env.resumes or (is_changed and not self._sums.is_in_doubt):
            self._sums.forget()
            self.env.report("sums", "made anew: the image was changed without this layer")

    def submit(self, batch: list[Request]) -> None:
        """Take requests; each goes down as one of ours."""
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
        """Go on with what the layer below gives back."""
        for own in batch:
            own.done(own)  # type: ignore[attr-defined]  # nothing else is sent
        self._pass_on()

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return {"rotten": len(self._rotten), "verified": self._verified, "learned": self._learned}

    def close(self) -> None:
        """Bring the sums into FILE, and close that. Raises: OSError."""
        try:
            if hasattr(self, "_sums"):
                self._sums.close(writes=not self.env.read_only)
        finally:
            if self._file is not None:
                self._file.close()

    def _from_file(self, batch: list[Request]) -> None:
        """Go on with what FILE gives back."""
        for part in batch:
            self._sums.take(part)  # type: ignore[arg-type]  # nothing else is sent there
        self._pass_on()

    def _pass_on(self) -> None:
        """Send down, and give back, what has come together meanwhile."""
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
        """Begin a request, once there is room for its copy."""
        if request.op != Op.DISCARD and (self._waiting or not self._has_room_for(request)):
            self._waiting.append(request)
        else:
            self._begin(request)

    def _has_room_for(self, request: Request) -> bool:
        return self._copies.have_room(request.length + 2 * self._block)

    def _begin(self, request: Request) -> None:
        """Begin a read, or what alters blocks that nothing else alters now."""
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
        """Begin to alter blocks, once they are in doubt."""
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
        """Read a block of which only a part is written."""
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
        own.status = max(own.status, edge.status)  # it is PENDING, which is less
        own.left -= 1
        if own.left:
            return
        if own.status > 0:
            self._let_go(own, own.status)
        else:
            own.status = PENDING
            self._write(own)

    def _write(self, own: _Own) -> None:
        """Send down whole blocks, of which no sum is known until they are back."""
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
        """Forget what was found of blocks that were altered as a whole."""
        left = {block for block in self._rotten if not own.first <= block <= own.last}
        if len(left) < len(self._rotten):
            self._rotten = left
            self._tell()

    def _let_go(self, own: _Own, status: int) -> None:
        """Give back a request that alters blocks, and begin what waited for that."""
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
        """Verify what was read, and give it back."""
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
        """Return 0 where every block is as its sum says, EILSEQ where one is not; -1: a write came by, read again."""
        memory, step, values = own.memory, self._block, self._sums.values
        is_same = self._sums.epoch(own.first, own.last) == own.epoch
        status = 0
        for block, known in enumerate(own.known, own.first):
            place = (block - own.first) * step
            if not known and not is_same:
                continue  # what was read may be older than what is there
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
        """Publish where the rotten blocks are; a medium that falls to pieces is not told block by block."""
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
        """Make durable what the layer below was given, for the sums alone."""
        assert self.below is not None  # noqa: S101 - as in `Filter.open`
        if not self.below.can_flush:
            done(0)
            return
        self.next.submit([self._own(Op.FLUSH, 0, 0, lambda own: done(own.status))])  # type: ignore[union-attr]  # as in `_pass_on`
