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
is to be sent gathers in lists: see `io`.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from xenbackend.block.driver import Driver, Env, File, Geometry
from xenbackend.block.mapped.io import ImageIO
from xenbackend.block.mapped.owners import Gathered, Memo, Owners
from xenbackend.block.mapped.pieces import Shape, Way, pieces_of
from xenbackend.block.mapped.shared import Once, Then
from xenbackend.block.mapped.tables import PLACE, Table, Tables
from xenbackend.block.options import FilePath, option
from xenbackend.block.request import PENDING, Op, Request, clear


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What the chain says of an image."""

    file: FilePath = option("the image file or block device", target=True)
    cache: bool = option("go through the host's page cache", default=False)
    share: bool = option("open it although others may write to it, as aio: says", default=False)


@dataclass(frozen=True, slots=True)
class ChildOptions(ImageOptions):
    """What the chain says of an image that may have a parent."""

    parents: str = option("where the files may be that the image names", default="")


@dataclass(frozen=True, slots=True)
class ChangedOptions(ChildOptions):
    """What the chain says of an image that knows when its parent was changed."""

    changed: Literal["refuse", "accept"] = option("a parent that was altered or exchanged", default="refuse")


class MappedDisk(Driver):
    """The base of mapped formats: a subclass reads the headers, calls `start`, and has the hooks below.

    Entries and tables: `xenbackend.block.mapped.tables`. A request that a hook gets is a guest's own or a `Part`; the
    hook ends it by `io.finish`, or passes it to another helper of `io` or of the disk.
    """

    Options: ClassVar[type] = ImageOptions
    step: ClassVar[int] = 0  # bytes: the file ends at a multiple of this; 0 for one that ends where it has to

    def open(self, env: Env) -> Geometry:
        """Open the image, and close it where it cannot be served. Raises: DriverError, OSError."""
        self.file = self.open_file(env)
        try:
            geometry = self.open_image(env, self.file)
        except BaseException:
            self.file.close()
            raise
        env.report("mode", self.file.mode)
        return geometry

    def open_file(self, env: Env, path: str = "", *, read_only: bool = False) -> File:
        """Open a file of the disk, by default the image itself. Raises: DriverError, OSError."""
        options = self.options
        return env.files.open(
            path or options.file,
            read_only=read_only or env.read_only,
            shareable=env.shareable,
            direct=not options.cache,
            step=self.step,
        )

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
            file: the image, as `ImageIO` takes it.
            size: bytes of the disk.
            cluster_bits: a cluster has 2 to the power of this many bytes.
            table_bits: a table has 2 to the power of this many entries.
            tables: what is known of them.
            data: the file that has the clusters, likewise.
        """
        self.file = file
        self.io = ImageIO(self, file, data)
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

    def open_image(self, env: Env, file: File) -> Geometry:
        """Read the headers, and call `start`; what then stands in the place of `self.file` closes it.

        Raises: DriverError, OSError.
        """
        raise NotImplementedError

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
        if self.io.is_apart:
            self.io.sync(partial(self.io.finish, request))
        else:
            self.io.to_file(request, 0)

    def discard(self, request: Request) -> None:
        """Forget the range, or parts of it."""
        self.io.finish(request, errno.EOPNOTSUPP)

    def shortcut(self, request: Request) -> int:  # noqa: ARG002 - for formats that know more than entries say
        """Return where all of a request lies in the file, though its entry does not say so; 0 if that is not known.

        Of a read that is all a parent's, return that parent's number in `owners`, less than 0: -1 for an unknown one.
        """
        return 0

    # The contract of a driver.

    def check_parent(self, parent: Geometry) -> None:
        """Remember where the parent ends; a child may be larger or smaller."""
        self._parent_size = parent.size
        self.on_complete = self.io.returned

    def submit(self, batch: list[Request]) -> None:
        """Take requests. This loop runs for every request."""
        young, table_shift, cluster_shift, table_mask, inside_mask, cluster = self._layout
        io, parent_size, known, gathered = self.io, self._parent_size, self._memo.known, self.owners.gathered
        free = io.free
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
                        ours = free.pop() if free else io.another()
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
            io.data.submit(moved)

    def close(self) -> None:
        """Close the files; nothing is in flight."""
        self.io.close()

    # What a format may call, from its hooks and from whatever they were promised to be called back by.

    def to_parent(self, request: Request) -> None:
        """Read from the parent, as far as it reaches, and zeros beyond."""
        inside = self._parent_size - request.offset
        if inside >= request.length:
            self.io.to_parent(request)
        elif inside <= 0:
            self.zeros(request)
        else:
            first, rest = self.io.split(request, [inside, request.length - inside])
            self.io.to_parent(first)
            self.zeros(rest)

    def zeros(self, request: Request) -> None:
        """Read zeros."""
        clear(request.iov)
        self.io.finish(request, 0)

    def dispatch(self, request: Request) -> None:
        """Send a request, or pieces of it, to where the tables say; also once more, when they have changed."""
        if request.op == Op.FLUSH:
            self.flush(request)
        elif request.op == Op.DISCARD:
            self.discard(request)
        else:
            pieces = pieces_of(request, self.tables.find, self._shape)
            parts = self.io.split(request, [length for _, _, length in pieces])
            for part, (way, place, _) in zip(parts, pieces, strict=True):
                self._send_by(part, way, place)

    def go_on(self, request: Request, status: int) -> None:
        """Go on with a request that has waited for a table or for room, or fail it where that failed."""
        if status:
            self.io.finish(request, status)
        else:
            self.dispatch(request)

    def read_disk(self, offset: int, view: memoryview, then: Then) -> None:
        """Read what the disk has now, wherever that is."""
        self.dispatch(self.io.part(Op.READ, offset, len(view), [view], then))

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
            self.io.data.submit(moved)
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
                moved.append(self.io.ours(request, place))
            elif place < 0:
                gathered[-1 - place].append(request)
            else:
                rest.append(request)
        return rest

    def _submit_odd(self, moved: list[Request], through: Gathered, odd: list[Request]) -> None:
        direct: dict[Any, list[Request]] = defaultdict(list)
        for known, requests in through:
            direct[known or self.next] += requests
        for request in odd:
            owner = self.owner(request.offset, request.length) if request.op == Op.READ and self._parent_size else self
            if owner is None or owner is self:
                self.dispatch(request)
            else:
                direct[owner].append(request)
        self.io.send(moved)
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
            self.io.to_file(request, place)
        elif way == Way.LOAD:
            self._loading.want(place, request, partial(self.load_table, place))
        else:
            self._ways[way](request)
