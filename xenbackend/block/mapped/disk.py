r"""A disk whose clusters lie in a file wherever there was room; the rest is its parent's, or zeros.

Must not know how a format writes its tables, nor wait for anything.

What lies in one cluster that the file has goes to the file as a request of ours, pooled, with the same memory at
another place: a batch stays a batch, and nothing is allocated. (To shift the request itself would cost the same, 0.3
us, but a filter above may look at what it has lent: `log:` does.) Everything else is `dispatch`ed: cut where that is
needed, each piece to where it belongs.

    submit -- the table says where --> file ---------------------> complete
       \-- dispatch -- READ  ------> file, parent, zeros, read_special
                    \- WRITE ------> file, write_elsewhere: the format finds a place, writes, and says so in its tables

What is all a parent's goes to the one that has it, however far down the chain, once that is known: see `owners`. What
is to be sent gathers in lists: see `sending`.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from xenbackend.block.driver import Driver, File, Geometry
from xenbackend.block.mapped.files import FileIO
from xenbackend.block.mapped.owners import Gathered, Memo, Owners
from xenbackend.block.mapped.parts import Part, clear
from xenbackend.block.mapped.pieces import Shape, Way, pieces_of
from xenbackend.block.mapped.shared import Once, Then
from xenbackend.block.mapped.tables import PLACE, Table, Tables
from xenbackend.block.request import PENDING, Op, Request


class MappedDisk(FileIO):
    """The base of mapped formats: a subclass opens the file, calls `start`, and has the hooks below.

    Entries and tables: `xenbackend.block.mapped.tables`. A request that a hook gets is a guest's own or a `Part`; the
    hook ends it by `finish`, or passes it to another of the helpers.
    """

    def start(
        self,
        file: File,
        size: int,
        *,
        cluster_bits: int,
        table_bits: int,
        tables: Tables[Table],
        data: File | None = None,
    ) -> None:
        """Begin to serve: call this from `open`.

        Args:
            file: the image; its completions are ours from now on.
            size: bytes of the disk.
            cluster_bits: a cluster has 2 to the power of this many bytes.
            table_bits: a table has 2 to the power of this many entries.
            tables: what is known of them.
            data: the file that has the clusters, where they are not in the image; its completions are ours as well.
        """
        self.begin_files(file, data, self._from_file)
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
        self._loading: Once[Request] = Once(self.go_on)
        self._parent_size = 0
        self.owners = Owners()
        self._memo = Memo(min(entries, -(-size // cluster)))

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
        if self.data is self.file:
            self.to_file(request, 0)
        else:
            self.sync(partial(self.finish, request))

    def discard(self, request: Request) -> None:
        """Forget the range, or parts of it."""
        self.finish(request, errno.EOPNOTSUPP)

    def shortcut(self, request: Request) -> int:  # noqa: ARG002 - for formats that know more than entries say
        """Return where all of a request lies in the file, though its entry does not say so; 0 if that is not known.

        Of a read that is all a parent's, return that parent's number in `owners`, less than 0: -1 for an unknown one.
        """
        return 0

    # The contract of a driver.

    def check_parent(self, parent: Geometry) -> None:
        """Remember where the parent ends; a child may be larger or smaller."""
        self._parent_size = parent.size
        self.on_complete = self._returned

    def submit(self, batch: list[Request]) -> None:
        """Take requests. This loop runs for every request."""
        young, table_shift, cluster_shift, table_mask, inside_mask, cluster = self._layout
        free, parent_size, known, gathered = self._free, self._parent_size, self._memo.known, self.owners.gathered
        moved: list[Request] = []
        odd: list[Request] = []
        for request in batch:
            offset = request.offset
            number = offset >> table_shift
            table = young.get(number)
            if table is not None:
                index = offset >> cluster_shift & table_mask
                entry = table[index]
                op, length = request.op, request.length
                if (offset & inside_mask) + length <= cluster:
                    if entry >> op & 1:
                        ours = free.pop() if free else self._another()
                        ours.op, ours.offset, ours.length = op, (entry & PLACE) + (offset & inside_mask), length
                        ours.iov, ours.tag, ours.status = request.iov, request, PENDING
                        moved.append(ours)
                        continue
                    if entry == op == 0 and offset + length <= parent_size:
                        gathered[known[number][index] if number in known else 0].append(request)
                        continue
            odd.append(request)
        if odd or parent_size:
            self._submit_sorted(moved, odd)
        elif moved:
            self.data.submit(moved)

    def close(self) -> None:
        """Close the file; nothing is in flight."""
        self.close_files()

    # What a format may call, from its hooks and from whatever they were promised to be called back by.

    def finish(self, request: Request, status: int) -> None:
        """End a request."""
        request.status = status
        if isinstance(request, Part) and request.pool is self._pool:
            request.done(request)
            self._pool.put(request)
        else:
            self._finished.append(request)

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

    def go_on(self, request: Request, status: int) -> None:
        """Go on with a request that has waited for a table or for room, or fail it where that failed."""
        if status:
            self.finish(request, status)
        else:
            self.dispatch(request)

    def split(self, request: Request, lengths: Sequence[int]) -> Sequence[Request]:
        """Return parts of a request, one for each length in bytes; it ends when they have. One part is itself.

        What is a part itself is replaced by its parts: however often a request is cut, they all end in one step.
        """
        if len(lengths) == 1:
            return [request]
        return self._pool.split(request, lengths, self._joined)

    def read_disk(self, offset: int, view: memoryview, then: Then) -> None:
        """Read what the disk has now, wherever that is."""
        self.dispatch(self.part(Op.READ, offset, len(view), [view], then))

    def entry(self, cluster: int) -> int | None:
        """Return a cluster's entry, or None where its table has to be loaded."""
        _, table_shift, cluster_shift, table_mask, _, _ = self._layout
        table = self.tables.find(cluster >> table_shift - cluster_shift)
        return None if table is None else table[cluster & table_mask]

    def owner(self, offset: int, length: int) -> Driver | None:
        """Return who can serve reads of a range: this disk, or one of its parents; None while that is not known."""
        _, table_shift, bits, table_mask, _, _ = self._layout
        first, end = offset >> bits, offset + length - 1 >> bits
        while first <= end:
            table = self.tables.find(first << bits >> table_shift)
            if table is None:
                return None
            last = min(end, first | table_mask)
            if any(table[first & table_mask : (last & table_mask) + 1]):
                return self
            first = last + 1
        return self._owner_below(offset, length) if offset + length <= self._parent_size else self

    # Sending pieces to where they belong.

    def _submit_sorted(self, moved: list[Request], odd: list[Request]) -> None:
        """Submit what was gathered by `submit`."""
        rest = self._sort(odd, moved) if odd else odd
        through = self.owners.take()
        if rest:
            self._submit_odd(moved, through, rest)
            return
        if moved:
            self.data.submit(moved)
        for owner, requests in through:
            if owner is None:
                self._to_unknown(requests)
            else:
                owner.submit(requests)

    def _sort(self, odd: list[Request], moved: list[Request]) -> list[Request]:
        """Take those out for which the format knows a shortcut."""
        rest, gathered = [], self.owners.gathered
        for request in odd:
            place = self.shortcut(request)
            if place > 0:
                moved.append(self._ours(request, place))
            elif place < 0:
                gathered[-1 - place].append(request)
            else:
                rest.append(request)
        return rest

    def _submit_odd(self, moved: list[Request], through: Gathered, odd: list[Request]) -> None:
        self._to_file += moved
        direct: dict[Any, list[Request]] = defaultdict(list)
        for known, requests in through:
            direct[known or self.next] += requests
        for request in odd:
            owner = self.owner(request.offset, request.length) if request.op == Op.READ and self._parent_size else self
            if owner is None or owner is self:
                self.dispatch(request)
            else:
                direct[owner].append(request)
        self._send()
        for owner, requests in direct.items():
            owner.submit(requests)

    def _to_unknown(self, requests: list[Request]) -> None:
        """Pass reads to the parent; those that come after them go where these would have been found."""
        offsets = [request.offset for request in requests]
        self.next.submit(requests)  # type: ignore[union-attr]  # whoever knows its size has been given it
        for offset in offsets:
            self._learn(offset)

    def _learn(self, offset: int) -> None:
        cluster, table_bits = offset >> self.cluster_bits, self._shape.table_bits
        owner = self._owner_below(cluster << self.cluster_bits, 1 << self.cluster_bits)
        if owner is not None:
            self._memo.remember(cluster >> table_bits, cluster & (1 << table_bits) - 1, self.owners.number(owner))

    def _owner_below(self, offset: int, length: int) -> Driver | None:
        """Return which parent can serve reads of a range of ours, None where that takes a table that is not loaded."""
        if offset + length <= self._parent_size and isinstance(self.next, MappedDisk):
            return self.next.owner(offset, length)
        return self.next

    def _send_by(self, request: Request, way: Way, place: int) -> None:
        if way == Way.FILE:
            self.to_file(request, place)
        elif way == Way.LOAD:
            self._loading.want(place, request, partial(self.load_table, place))
        else:
            self._ways[way](request)

    def _joined(self, part: Part) -> None:
        join = part.tag
        join.left -= 1
        join.status = join.status or part.status
        if not join.left:
            self.finish(join.request, join.status)

    # What comes back.

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
