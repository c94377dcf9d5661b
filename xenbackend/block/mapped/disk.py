r"""A disk whose clusters lie in a file wherever there was room; the rest is its parent's, or zeros.

Must not know how a format writes its tables, nor wait for anything.

What lies in one cluster that the file has goes to the file as a request of ours, pooled, with the same memory at
another place: a batch stays a batch, and nothing is allocated. (To shift the request itself would cost the same, 0.3
us, but a filter above may look at what it has lent: `log:` does.) Everything else is `dispatch`ed: cut where that is
needed, each piece to where it belongs.

    submit -- the table says where --> file ---------------------> complete
       \-- dispatch -- READ  ------> file, parent, zeros, read_special
                    \- WRITE ------> file, write_elsewhere: the format finds a place, writes, and says so in its tables

Nothing is submitted in the middle of a decision: what is to be sent gathers in lists until the outermost call of this
file ends, so that batches form by themselves and no callback runs inside another one's loop.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial

from xenbackend.block.driver import Driver, File, Geometry
from xenbackend.block.mapped.parts import Join, Part, Pool, allocate, clear, cut
from xenbackend.block.mapped.pieces import Shape, Way, pieces_of
from xenbackend.block.mapped.shared import Shared, Then
from xenbackend.block.mapped.tables import PLACE, Table, Tables
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.units import PAGE


class MappedDisk(Driver):
    """The base of mapped formats: a subclass opens the file, calls `start`, and has the hooks below.

    Entries and tables: `xenbackend.block.mapped.tables`. A request that a hook gets is a guest's own or a `Part`; the
    hook ends it by `finish`, or passes it to another of the helpers.
    """

    def start(self, file: File, size: int, *, cluster_bits: int, table_bits: int, tables: Tables[Table]) -> None:
        """Begin to serve: call this from `open`.

        Args:
            file: the image; its completions are ours from now on.
            size: bytes of the disk.
            cluster_bits: a cluster has 2 to the power of this many bytes.
            table_bits: a table has 2 to the power of this many entries.
            tables: what is known of them.
        """
        self.file = file
        self.size = size
        self.tables = tables
        self.cluster_bits = cluster_bits
        cluster, entries = 1 << cluster_bits, 1 << table_bits
        self._layout = tables.young, cluster_bits + table_bits, cluster_bits, entries - 1, cluster - 1, cluster
        self._shape = Shape(cluster_bits, table_bits)
        self._ways = {
            Way.PARENT: self.to_parent, Way.ZEROS: self.zeros,
            Way.SPECIAL: self.read_special, Way.ELSEWHERE: self.write_elsewhere,
        }  # fmt: skip
        self._pool = Pool()
        self._moved: list[
            Request
        ] = []  # ours for the file, each with the one that it stands for as its tag: all of them
        self._free: list[Request] = []  # those of them that are not at the file
        self._to_file: list[Request] = []
        self._to_parent: list[Request] = []
        self._finished: list[Request] = []
        self._soon: list[Callable[[], None]] = []
        self._pages: list[memoryview] = []  # for writes of metadata: to map one anew costs as much as the write
        self._is_sending = False
        self._waiting: dict[int, list[Request]] = {}  # for tables that are being loaded
        self._watches: list[tuple[set[Request], Callable[[], None]]] = []
        self._parent_size = 0
        self._sync = Shared(self._begin_sync, self.soon)
        file.complete = self._from_file

    # What a format does.

    def load_table(self, number: int, then: Then) -> None:
        """Get a table that `tables` does not have, put it there, then call `then`; once for all who need it."""
        raise NotImplementedError

    def read_special(self, request: Request) -> None:
        """Read inside one cluster whose entry is SPECIAL."""
        raise NotImplementedError

    def write_elsewhere(self, request: Request) -> None:
        """Write to clusters, all in one table, none of which may be written where it is."""
        raise NotImplementedError

    def flush(self, request: Request) -> None:
        """Make what was completed durable; enough as it is where answers wait for the metadata's writes."""
        self.to_file(request, 0)

    def discard(self, request: Request) -> None:
        """Forget the range, or parts of it."""
        self.finish(request, errno.EOPNOTSUPP)

    def shortcut(self, request: Request) -> int:  # noqa: ARG002 - for formats that know more than entries say
        """Return where all of a request lies in the file, though its entry does not say so; 0 if that is not known."""
        return 0

    # The contract of a driver.

    def check_parent(self, parent: Geometry) -> None:
        """Remember where the parent ends; a child may be larger or smaller."""
        self._parent_size = parent.size
        self.on_complete = self._returned

    def submit(self, batch: list[Request]) -> None:
        """Take requests. This loop runs for every request."""
        young, table_shift, cluster_shift, table_mask, inside_mask, cluster = self._layout
        free, parent_size = self._free, self._parent_size
        moved: list[Request] = []
        through: list[Request] = []  # to the parent, as they are
        odd: list[Request] = []
        for request in batch:
            offset = request.offset
            table = young.get(offset >> table_shift)
            if table is not None:
                entry = table[offset >> cluster_shift & table_mask]
                op, length = request.op, request.length
                if (offset & inside_mask) + length <= cluster:
                    if entry >> op & 1:
                        ours = free.pop() if free else self._another()
                        ours.op, ours.offset, ours.length = op, (entry & PLACE) + (offset & inside_mask), length
                        ours.iov, ours.tag, ours.status = request.iov, request, PENDING
                        moved.append(ours)
                        continue
                    if entry == op == 0 and offset + length <= parent_size:
                        through.append(request)
                        continue
            odd.append(request)
        if odd:
            self._submit_odd(moved, through, odd)
            return
        if moved:
            self.file.submit(moved)
        if through:
            self.next.submit(through)  # type: ignore[union-attr]  # whoever knows its size has been given it

    def close(self) -> None:
        """Close the file; nothing is in flight."""
        self.file.close()

    # What a format may call, from its hooks and from whatever they were promised to be called back by.

    def finish(self, request: Request, status: int) -> None:
        """End a request."""
        request.status = status
        if isinstance(request, Part) and request.pool is self._pool:
            request.done(request)
            self._pool.put(request)
        else:
            self._finished.append(request)

    def to_file(self, request: Request, place: int) -> None:
        """Let the file do a request at `place`; it ends as the file ends it."""
        ours = self._free.pop() if self._free else self._another()
        ours.op, ours.offset, ours.length = request.op, place, request.length
        ours.iov, ours.tag, ours.status = request.iov, request, PENDING
        self._to_file.append(ours)

    def to_parent(self, request: Request) -> None:
        """Read from the parent, as far as it reaches, and zeros beyond."""
        inside = self._parent_size - request.offset
        if inside >= request.length:
            self._to_parent.append(request)
        elif inside <= 0:
            self.zeros(request)
        else:
            first, rest = self.split(request, [inside, request.length - inside])
            self._to_parent.append(first)
            self.zeros(rest)

    def zeros(self, request: Request) -> None:
        """Read zeros."""
        clear(request.iov)
        self.finish(request, 0)

    def dispatch(self, request: Request) -> None:
        """Send a request, or pieces of it, to where the tables say; also once more, when they have changed."""
        if request.op == Op.FLUSH:
            self.flush(request)
        elif request.op == Op.DISCARD:
            self.discard(request)
        else:
            pieces = pieces_of(request, self.tables.find, self._shape)
            parts = self.split(request, [length for _, _, length in pieces])
            for part, (way, place, _) in zip(parts, pieces, strict=True):
                self._send_by(part, way, place)

    def split(self, request: Request, lengths: Sequence[int]) -> Sequence[Request]:
        """Return parts of a request, one for each length in bytes; it ends when they have. One part is itself."""
        if len(lengths) == 1:
            return [request]
        join, offset = Join(request, len(lengths)), request.offset
        parts = []
        for length, iov in zip(lengths, cut(request.iov, lengths), strict=True):
            parts.append(self._pool.take(request.op, offset, length, iov, self._joined, join))
            offset += length
        return parts

    def write_data(self, place: int, iov: Sequence[memoryview], then: Then) -> None:
        """Write to the file."""
        length = sum(map(len, iov))
        self.to_file(self._pool.take(Op.WRITE, place, length, iov, _tell, then), place)

    def read_disk(self, offset: int, view: memoryview, then: Then) -> None:
        """Read what the disk has now, wherever that is."""
        self.dispatch(self._pool.take(Op.READ, offset, len(view), [view], _tell, then))

    def read_meta(self, place: int, length: int, then: Callable[[int, memoryview], None]) -> None:
        """Read from the file; what is past its end is zeros."""
        view = allocate(length)
        self.to_file(self._pool.take(Op.READ, place, length, [view], _tell_with, (then, view)), place)

    def write_meta(self, place: int, data: bytes, then: Then) -> None:
        """Write to the file."""
        pages = self._pages
        page = pages.pop() if pages and len(data) <= PAGE else allocate(max(len(data), PAGE))
        view = page[: len(data)]
        view[:] = data
        self.write_data(place, [view], partial(self._meta_written, page, then))

    def sync(self, then: Then) -> None:
        """Make durable what the file has completed; who asks at the same time shares one flush."""
        self._sync.want(then)

    def soon(self, call: Callable[[], None]) -> None:
        """Call when everything that is there to be sent has been sent, before the outermost call ends."""
        self._soon.append(call)

    def in_thread(self, function: Callable[[], None], then: Then) -> None:
        """Do something that blocks, in a thread; an OSError is its status."""
        result = [0]

        def run() -> None:
            try:
                function()
            except OSError as error:
                result[0] = error.errno or errno.EIO

        def finish() -> None:
            then(result[0])
            self._send()

        self.env.run_in_thread(run, finish)

    def when_quiet(self, then: Callable[[], None]) -> None:
        """Call when everything that the file has now is back: nobody reads or writes a place from before any more."""
        out = {request for request in self._moved if request.status == PENDING}
        if out:
            self._watches.append((out, then))
        else:
            then()

    def entry(self, cluster: int) -> int | None:
        """Return a cluster's entry, or None where its table has to be loaded."""
        _, table_shift, cluster_shift, table_mask, _, _ = self._layout
        table = self.tables.find(cluster >> table_shift - cluster_shift)
        return None if table is None else table[cluster & table_mask]

    def _meta_written(self, page: memoryview, then: Then, status: int) -> None:
        if len(page) == PAGE:
            self._pages.append(page)
        then(status)

    # Sending pieces to where they belong.

    def _another(self) -> Request:
        request = Request()
        self._moved.append(request)
        return request

    def _submit_odd(self, moved: list[Request], through: list[Request], odd: list[Request]) -> None:
        self._to_file += moved
        self._to_parent += through
        for request in odd:
            place = self.shortcut(request)
            if place:
                self.to_file(request, place)
            else:
                self.dispatch(request)
        self._send()

    def _send_by(self, request: Request, way: Way, place: int) -> None:
        if way == Way.FILE:
            self.to_file(request, place)
        elif way == Way.LOAD:
            self._await_table(request, place)
        else:
            self._ways[way](request)

    def _await_table(self, request: Request, number: int) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None:
            waiting.append(request)
            return
        self._waiting[number] = [request]
        self.load_table(number, partial(self._loaded, number))

    def _loaded(self, number: int, status: int) -> None:
        for request in self._waiting.pop(number):
            if status:
                self.finish(request, status)
            else:
                self.dispatch(request)

    def _joined(self, part: Part) -> None:
        join = part.tag
        join.left -= 1
        join.status = join.status or part.status
        if not join.left:
            self.finish(join.request, join.status)

    def _begin_sync(self, then: Then) -> None:
        self.to_file(self._pool.take(Op.FLUSH, 0, 0, (), _tell, then), 0)

    # Sending, and what comes back.

    def _send(self) -> None:
        """Send what has gathered, until nothing is left; whoever is inside this already does it."""
        if self._is_sending:
            return
        self._is_sending = True
        try:
            while self._send_one():
                pass
        finally:
            self._is_sending = False

    def _send_one(self) -> bool:
        if self._to_file:
            batch, self._to_file = self._to_file, []
            self.file.submit(batch)
        elif self._to_parent:
            batch, self._to_parent = self._to_parent, []
            self.next.submit(batch)  # type: ignore[union-attr]  # whoever knows its size has been given it
        elif self._finished:
            batch, self._finished = self._finished, []
            self.complete(batch)
        elif self._soon:
            calls, self._soon = self._soon, []
            for call in calls:
                call()
        else:
            return False
        return True

    def _from_file(self, batch: list[Request]) -> None:
        """Take back what the file has done. This loop runs for every request."""
        done = []
        for ours in batch:
            request = ours.tag
            request.status = ours.status
            ours.iov = ours.tag = ()  # a view that is kept keeps a guest's memory
            done.append(request)
        if self._watches:
            self._notice(batch)
        self._free += batch
        self._returned(done)

    def _returned(self, batch: list[Request]) -> None:
        """Give back what is the layer's above, and go on with our own."""
        if not (self._pool.lent or self._soon):
            self.complete(batch)
            return
        for request in batch:
            self.finish(request, request.status)
        self._send()

    def _notice(self, batch: list[Request]) -> None:
        watches, self._watches = self._watches, []
        for out, then in watches:
            out.difference_update(batch)
            if out:
                self._watches.append((out, then))
            else:
                self.soon(then)


def _tell(part: Part) -> None:
    part.tag(part.status)


def _tell_with(part: Part) -> None:
    then, view = part.tag
    then(part.status, view)
