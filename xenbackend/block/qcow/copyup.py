"""The first write to a cluster: a new place in the file, the data there, then the entry that names it.

Must not know how entries are written, nor which clusters are free: `Mapping` and the allocator do.

    find room -> data, and around them what the cluster had -> (flush) -> entry -> answer

The flush is there where bytes that nobody writes now came to a new place: a table that names them must not be durable
before they are. At the end of the file, where everything reads as zeros, nothing has to be put around the data of a
cluster that had nothing.

Where clusters are in a file of their own, every cluster has its one place there, with whatever was there before: the
flush is always there, and nothing is written behind the end of the disk, where the file may end.
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

Reserve = Callable[[int, int, Any], None]  # first cluster of the disk, how many; calls back as `Allocator.reserve` does


class CopyUp:
    """Writes to clusters that cannot be written where they are; one write to a cluster at a time."""

    def __init__(
        self,
        disk: MappedDisk,
        mapping: Mapping,
        reserve: Reserve,
        table_bits: int,
        reaches_parent: Callable[[int], bool],
    ) -> None:
        """Take what does the steps; `reaches_parent` says whether the parent has something at an offset or behind."""
        self._disk = disk
        self._io = disk.io
        self._mapping = mapping
        self._reserve = reserve
        self._is_apart = disk.io.is_apart
        self._table_bits = table_bits
        self._reaches_parent = reaches_parent
        self._bits = disk.cluster_bits
        self._waiting: dict[int, list[Request]] = {}  # by cluster that is being written; never without an entry

    def write(self, request: Request) -> None:
        """Write to clusters of one table, none of which may be written in place; end it by `finish`."""
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
        """Let those go on that waited for clusters."""
        waiting = [each for cluster in clusters for each in self._waiting.pop(cluster)]
        for each in waiting:
            self._disk.dispatch(each)

    def _serve(self, request: Request, clusters: range) -> Steps[None]:
        """Write piece by piece: as much at a time as there is room for in one place."""
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
        """Write what the disk is to hold between two offsets to new clusters at `place`."""
        size = 1 << self._bits
        before, behind = start % size, -stop % size
        if self._is_apart:
            behind = min(behind, self._disk.size - stop)
        needs_sync = self._is_apart
        if not (before or behind):  # whole clusters, as of a guest that writes in sequence
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
        """Return what a part of a cluster holds, nothing where that need not be written; and whether it need not."""
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
    """Do nothing when the steps have ended: they finish their request themselves."""
