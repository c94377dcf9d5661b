"""What a mapped disk does with its files: the image, which has the tables, and the file that has the clusters.

As a rule they are one file. Where they are two, what clusters hold is made durable before the tables are that may name
them. Must not know where anything lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from xenbackend.block.driver import Complete, File
from xenbackend.block.mapped.parts import Part, Pool, allocate, tell, tell_with
from xenbackend.block.mapped.sending import Sending
from xenbackend.block.mapped.shared import Shared, Then
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.units import PAGE


class FileIO(Sending):
    """The base of `disk.MappedDisk`: requests of our own to its files, for itself and for its formats."""

    def begin_files(self, file: File, data: File | None, complete: Complete) -> None:
        """Take the files; `data` is the one that has the clusters, where that is not the image."""
        self._begin_sending()
        self.file = file
        self.data = data or file
        self._pool = Pool()
        self._moved: list[Request] = []  # ours for the files: all of them; each one's tag is what it stands for
        self._free: list[Request] = []  # those of them that are not at a file
        self._pages: list[memoryview] = []  # for writes of metadata: to map one anew costs as much as the write
        self._watches: list[tuple[set[Request], Callable[[], None]]] = []
        self._sync = self._sync_data = Shared(self._flush_data, self.soon)
        if data is not None:
            self._sync = Shared(self._flush_both, self.soon)
        file.complete = self.data.complete = complete

    def close_files(self) -> None:
        """Close them. Raises: OSError."""
        try:
            if self.data is not self.file:
                self.data.close()
        finally:
            self.file.close()

    def to_file(self, request: Request, place: int) -> None:
        """Let the file that has the clusters do a request at `place`; it ends as the file ends it."""
        self._to_file.append(self._ours(request, place))

    def part(self, op: int, offset: int, length: int, iov: Sequence[memoryview], then: Then) -> Part:
        """Return a request of our own."""
        return self._pool.take(op, offset, length, iov, tell, then)

    def write_data(self, place: int, iov: Sequence[memoryview], then: Then) -> None:
        """Write clusters, or parts of them."""
        self.to_file(self.part(Op.WRITE, place, sum(map(len, iov)), iov, then), place)

    def read_meta(self, place: int, length: int, then: Callable[[int, memoryview], None]) -> None:
        """Read from the image; what is past its end is zeros."""
        view = allocate(length)
        self._to_image(self._pool.take(Op.READ, place, length, [view], tell_with, (then, view)), place)

    def write_meta(self, place: int, data: bytes, then: Then) -> None:
        """Write to the image."""
        pages = self._pages
        page = pages.pop() if pages and len(data) <= PAGE else allocate(max(len(data), PAGE))
        page[: len(data)] = data
        iov, ended = [page[: len(data)]], partial(self._meta_written, page, then)
        self._to_image(self.part(Op.WRITE, place, len(data), iov, ended), place)

    def sync(self, then: Then) -> None:
        """Make durable what was completed; who asks at the same time shares one flush."""
        self._sync.want(then)

    def order(self, then: Then) -> None:
        """Let what was completed be durable before what is written from now on; in a draft nobody relies on that."""
        if self.env.is_draft:
            self.soon(partial(then, 0))
        else:
            self._sync.want(then)

    def sync_data(self, then: Then) -> None:
        """Make durable what was completed of clusters, likewise."""
        self._sync_data.want(then)

    def when_quiet(self, then: Callable[[], None]) -> None:
        """Call when everything that the files have now is back: nobody reads or writes a place from before any more."""
        if out := {request for request in self._moved if request.status == PENDING}:
            self._watches.append((out, then))
        else:
            then()

    def _to_image(self, request: Request, place: int) -> None:
        (self._to_file if self.data is self.file else self._to_tables).append(self._ours(request, place))

    def _ours(self, request: Request, place: int) -> Request:
        ours = self._free.pop() if self._free else self._another()
        ours.op, ours.offset, ours.length = request.op, place, request.length
        ours.iov, ours.tag, ours.status = request.iov, request, PENDING
        return ours

    def _another(self) -> Request:
        request = Request()
        self._moved.append(request)
        return request

    def _meta_written(self, page: memoryview, then: Then, status: int) -> None:
        if len(page) == PAGE:
            self._pages.append(page)
        then(status)

    def _flush_data(self, then: Then) -> None:
        self.to_file(self.part(Op.FLUSH, 0, 0, (), then), 0)

    def _flush_both(self, then: Then) -> None:
        """Flush the clusters, then the tables, which may name them."""
        self._flush_data(partial(self._flush_image, then))

    def _flush_image(self, then: Then, status: int) -> None:
        if status:
            then(status)
        else:
            self._to_image(self.part(Op.FLUSH, 0, 0, (), then), 0)

    def _notice(self, batch: list[Request]) -> None:
        """Tell those who wait for requests of before that these are back."""
        watches, self._watches = self._watches, []
        for out, then in watches:
            out.difference_update(batch)
            if out:
                self._watches.append((out, then))
            else:
                self.soon(then)
