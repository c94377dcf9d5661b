r"""A disk whose clusters may be anywhere in a file; clusters that the file does not have are its parent's, or zeros.

Must not know how a format writes its tables, nor wait for anything.

A request within one cluster that the file has goes to the file as a pooled request of our own, with the same memory at
another place: a batch stays a batch, and nothing is allocated. (Shifting the request itself would cost the same, 0.3
us, but a filter above may look at the requests that it has lent, as `log:` does.) All other requests are `dispatch`ed:
split if necessary, and each piece sent where it belongs.

    submit -- the table says where --> file ---------------------> complete
       \-- dispatch -- READ  ------> file, parent, zeros, read_special
                    \- WRITE ------> file, write_elsewhere: the format finds a place, writes, and updates its tables

A read of data that only a parent has goes to that parent directly, however far down it is, once it is known: see
`owners`. Requests to be sent are collected in lists: see `io`.
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
    """The options of an image that has no parent."""

    file: FilePath = option("the image file or block device", target=True)
    cache: bool = option("go through the host's page cache", default=False)
    share: bool = option("others may write to it at the same time, see aio:", default=False)


@dataclass(frozen=True, slots=True)
class ChildOptions(ImageOptions):
    """The options of an image that may have a parent."""

    parents: str = option(
        "files that the image may lead to, and directories of such files, with colons between", default=""
    )


@dataclass(frozen=True, slots=True)
class ChangedOptions(ChildOptions):
    """The options of an image that can tell whether its parent was changed."""

    changed: Literal["refuse", "accept"] = option("what to do if the parent was changed or replaced", default="refuse")


class MappedDisk(Driver):
    """The base of mapped formats: a subclass reads the headers, calls `start`, and implements the hooks below.

    Entries and tables: `xenbackend.block.mapped.tables`. A hook gets a guest's own request or a `Part`. It ends the
    request by `io.finish`, or passes it to another helper of `io` or of the disk.
    """

    Options: ClassVar[type] = ImageOptions
    step: ClassVar[int] = 0  # bytes: the file's size is made a multiple of this; 0: it is left as it is

    def open(self, env: Env) -> Geometry:
        """Open the image; close it again if it cannot be served. Raises: DriverError, OSError."""
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
            lengths=None if path else env.lengths(),
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
        """Prepare for serving; to be called from `open_image`.

        Args:
            file: the image, as for `ImageIO`.
            size: bytes of the disk.
            cluster_bits: a cluster has 2 to the power of this many bytes.
            table_bits: a table has 2 to the power of this many entries.
            tables: the cache of tables.
            data: the file that has the clusters if that is another one, as for `ImageIO`.
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

    # Hooks, which a format implements.

    def open_image(self, env: Env, file: File) -> Geometry:
        """Read the headers, and call `start`. If this replaces `self.file`, the replacement has to close `file`.

        Raises: DriverError, OSError.
        """
        raise NotImplementedError

    def load_table(self, number: int, then: Then) -> None:
        """Read a table that `tables` does not have, put it there, then call `then`. Called once for all who need it."""
        raise NotImplementedError

    def read_special(self, request: Request) -> None:
        """Do a read inside one cluster whose entry is SPECIAL."""
        raise NotImplementedError

    def write_elsewhere(self, request: Request) -> None:
        """Do a write to clusters, all in one table, none of which may be written in place."""
        raise NotImplementedError

    def flush(self, request: Request) -> None:
        """Make completed requests durable. Override it if requests are completed before their metadata are written."""
        if self.io.is_apart:
            self.io.sync(partial(self.io.finish, request))
        else:
            self.io.to_file(request, 0)

    def discard(self, request: Request) -> None:
        """Discard the range, or parts of it; by default not supported."""
        self.io.finish(request, errno.EOPNOTSUPP)

    def shortcut(self, request: Request) -> int:  # noqa: ARG002 - for formats that know more than entries say
        """Return where the whole of a request is in the file, though its entry does not say so; 0 if that is not known.

        For a read of data that only parents have, return -1 minus the number in `owners` of the parent that has them,
        so -1 if that parent is not known.
        """
        return 0

    # The contract of a driver.

    def check_parent(self, parent: Geometry) -> None:
        """Remember the parent's size, which may be smaller or larger than the child's."""
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

    # Helpers, which a format may call from its hooks and its callbacks.

    def to_parent(self, request: Request) -> None:
        """Do a read from the parent; beyond its end there are zeros."""
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
        """Do a read of zeros."""
        clear(request.iov)
        self.io.finish(request, 0)

    def dispatch(self, request: Request) -> None:
        """Send a request, or pieces of it, where the tables say; may be called again after the tables have changed."""
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
        """Dispatch a request that has waited for a table or for room; end it with `status` if that failed."""
        if status:
            self.io.finish(request, status)
        else:
            self.dispatch(request)

    def read_disk(self, offset: int, view: memoryview, then: Then) -> None:
        """Read the disk's present content from `offset` on into `view`, wherever it is."""
        self.dispatch(self.io.part(Op.READ, offset, len(view), [view], then))

    def entry(self, cluster: int) -> int | None:
        """Return a cluster's entry, or None if its table is not loaded."""
        _, table_shift, cluster_shift, table_mask, _, _ = self._layout
        table = self.tables.find(cluster >> table_shift - cluster_shift)
        return None if table is None else table[cluster & table_mask]

    def owner(self, offset: int, length: int) -> Driver | None:
        """Return the layer that can serve reads of a range, this disk or a parent; None if tables are missing."""
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

    # Sending requests where they belong.

    def _submit_sorted(self, moved: list[Request], odd: list[Request]) -> None:
        """Send what `submit` has sorted: `moved` to the file, gathered reads to their owners, and `odd` one by one."""
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
        """Sort the requests for which the format knows a shortcut; return the others."""
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
        """Pass reads to the parent, and remember the owners of their clusters for the reads that follow."""
        offsets = [request.offset for request in requests]
        self.next.submit(requests)  # type: ignore[union-attr]  # there is one if its size is known
        for offset in offsets:
            self._learn(offset)

    def _learn(self, offset: int) -> None:
        cluster, table_bits = offset >> self.cluster_bits, self._shape.table_bits
        owner = self._owner_below(cluster << self.cluster_bits, 1 << self.cluster_bits)
        if owner is not None:
            self._memo.remember(cluster >> table_bits, cluster & (1 << table_bits) - 1, self.owners.number(owner))

    def _owner_below(self, offset: int, length: int) -> Driver | None:
        """Return the parent that can serve reads of a range, or None if a table is missing that would tell."""
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
