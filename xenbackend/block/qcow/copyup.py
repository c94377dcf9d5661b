"""The first write to a cluster: find a new place in the file, write the data there, then the entry that refers to it.

Must not know how entries are written, nor which clusters are free: `Mapping` and the allocator do.

    find room -> data, with the cluster's old content around them -> (flush) -> entry -> answer

The flush is needed if old content was copied to the new place: a table that refers to it must not become durable
earlier. At the end of the file everything reads as zeros, so there the data of a cluster that had no content need
nothing around them.

In an external data file every cluster has a fixed place, with whatever was there before: so the flush is always needed,
and nothing is written beyond the end of the disk, where the file may end.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

from xenbackend.block.mapped.disk import MappedDisk
from xenbackend.block.mapped.parts import allocate, cut
from xenbackend.block.mapped.tables import OWNED, ZERO
from xenbackend.block.qcow.level2 import Mapping
from xenbackend.block.request import Request
from xenbackend.loop.steps import Steps, run

Reserve = Callable[[int, int, Any], None]  # first cluster of the disk, how many, callback as of `Allocator.reserve`


class CopyUp:
    """Does writes to clusters that cannot be written in place; one write to a cluster at a time."""

    def __init__(
        self,
        disk: MappedDisk,
        mapping: Mapping,
        reserve: Reserve,
        table_bits: int,
        reaches_parent: Callable[[int], bool],
    ) -> None:
        """`reaches_parent` tells whether an offset of the disk is before the end of the parent."""
        self._disk = disk
        self._io = disk.io
        self._mapping = mapping
        self._reserve = reserve
        self._is_apart = disk.io.is_apart
        self._table_bits = table_bits
        self._reaches_parent = reaches_parent
        self._bits = disk.cluster_bits
        self._waiting: dict[int, list[Request]] = {}  # by cluster that is being written, which always has an entry

    def write(self, request: Request) -> None:
        """Do a write to clusters of one table, none of which may be written in place; end it by `finish`."""
        clusters = self._clusters(request)
        for cluster in clusters:
            if cluster in self._waiting:
                self._waiting[cluster].append(request)
                return
        for cluster in clusters:
            self._waiting[cluster] = []
        run(self._serve(request, clusters), _nothing)

    def _clusters(self, request: Request) -> range:
        return range(request.offset >> self._bits, (request.offset + request.length - 1 >> self._bits) + 1)

    def _release(self, clusters: range) -> None:
        """Dispatch the requests that waited for these clusters."""
        waiting = [each for cluster in clusters for each in self._waiting.pop(cluster)]
        for each in waiting:
            self._disk.dispatch(each)

    def _serve(self, request: Request, clusters: range) -> Steps[None]:
        """Write piece by piece, each as long as the room that was found in a row."""
        status, offset, end = 0, request.offset, request.offset + request.length
        views: Sequence[memoryview] = request.iov
        number, index = divmod(clusters.start, 1 << self._table_bits)
        try:
            yield from self._mapping.refuse_tables(number, range(index, index + len(clusters)))
            while offset < end:
                first = offset >> self._bits
                place, got, is_zero = yield partial(self._reserve, first, clusters.stop - first)
                stop = min(end, first + got << self._bits)
                piece, views = (views, ()) if stop == end else cut(views, [stop - offset, end - stop])
                yield from self._write(offset, stop, piece, place, is_zero=is_zero)
                offset = stop
        except OSError as error:
            status = error.errno or errno.EIO
        self._io.finish(request, status)
        self._release(clusters)

    def _write(self, start: int, stop: int, views: Sequence[memoryview], place: int, *, is_zero: bool) -> Steps[None]:
        """Write the new content of the disk from `start` to `stop` to new clusters at `place`."""
        size = 1 << self._bits
        before, behind = start % size, -stop % size
        if self._is_apart:
            behind = min(behind, self._disk.size - stop)
        needs_sync = self._is_apart
        if not (before or behind):  # whole clusters, as a guest's that writes sequentially
            yield partial(self._io.write_data, place, views)
        else:
            head, no_head = yield from self._old(start - before, before, is_zero=is_zero)
            tail, no_tail = yield from self._old(stop, behind, is_zero=is_zero)
            iov = [view for view in (head, *views, tail) if len(view)]
            yield partial(self._io.write_data, place + before - len(head), iov)
            needs_sync = needs_sync or not (no_head and no_tail)
        if needs_sync:
            yield self._io.sync_data
        number, index = divmod(start >> self._bits, 1 << self._table_bits)
        entries = [each | OWNED for each in range(place, place + before + stop - start, size)]
        yield from self._mapping.change(number, index, entries)

    def _old(self, offset: int, length: int, *, is_zero: bool) -> Generator[Any, Any, tuple[memoryview, bool]]:
        """Return the old content of a part of a cluster, empty if it need not be written, and whether it need not."""
        if not length:
            return memoryview(b""), True
        entry = self._disk.entry(offset >> self._bits)
        is_plain = entry is not None and (entry == ZERO or (entry == 0 and not self._reaches_parent(offset)))
        if is_plain and is_zero:
            return memoryview(b""), True
        view = allocate(length)
        on_disk = min(length, self._disk.size - offset)
        if not is_plain and on_disk > 0:
            yield partial(self._disk.read_disk, offset, view[:on_disk])
        return view, False


def _nothing(_status: int, _result: None) -> None:
    """Do nothing at the end of the steps, which finish their request themselves."""
