"""The files of a mapped disk, and requests on their way to the files, to the parent, and back to their senders.

Requests to be sent are collected in lists until the outermost call ends, so that batches form by themselves: nothing is
submitted in the middle of a decision, and no callback runs inside the loop of another one. The image has the tables,
and usually the clusters, too. If a second file has the clusters, they are made durable before the tables that may refer
to them. Must not decide where a request goes, nor know where anything is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial

from xenbackend.block.driver import Driver, File
from xenbackend.block.mapped.parts import Join, Part, Pool, allocate, tell, tell_with
from xenbackend.block.mapped.shared import Shared, Then
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.units import PAGE


class ImageIO:
    """Sends the guest's requests to a disk, and requests of its format's own.

    A request that is passed in is a guest's own or a `Part`; `finish` ends both kinds.

    Args:
        disk: the disk; its `env` is set, and `next` is its parent, if any.
        file: the image; its completions come here from now on.
        data: the file that has the clusters, if the image does not; its completions come here, too.
    """

    def __init__(self, disk: Driver, file: File, data: File | None = None) -> None:
        self._disk = disk
        self.file = file
        self.data = data or file
        self.is_apart = data is not None
        self.pool = Pool()
        self.moved: list[Request] = []  # all our requests to the files; the tag is the request that each stands for
        self.free: list[Request] = []  # those of `moved` that are not in use
        self._to_file: list[Request] = []
        self._to_tables: list[Request] = []  # to the image, if the clusters are in another file
        self._to_parent: list[Request] = []
        self._finished: list[Request] = []
        self._soon: list[Callable[[], None]] = []
        self._is_sending = False
        self._pages: list[memoryview] = []  # reused for metadata writes: mapping a page costs as much as the write
        self._watches: list[tuple[set[Request], Callable[[], None]]] = []
        self._sync = self._sync_data = Shared(self._flush_data, self.soon)
        if data is not None:
            self._sync = Shared(self._flush_both, self.soon)
        file.complete = self.data.complete = self._from_file

    def close(self) -> None:
        """Close the files; nothing is in flight. Raises: OSError."""
        try:
            if self.is_apart:
                self.data.close()
        finally:
            self.file.close()

    # Requests.

    def finish(self, request: Request, status: int) -> None:
        """End a request with a status."""
        request.status = status
        if isinstance(request, Part) and request.pool is self.pool:
            request.done(request)
            self.pool.put(request)
        else:
            self._finished.append(request)

    def split(self, request: Request, lengths: Sequence[int]) -> Sequence[Request]:
        """Return parts of a request, one for each length in bytes; the request ends when all of them have.

        For a single length, return the request itself. A request that is a part is replaced by its parts, so however
        often a request is split, there is one level of parts.
        """
        if len(lengths) == 1:
            return [request]
        return self.pool.split(request, lengths, self._joined)

    def part(self, op: int, offset: int, length: int, iov: Sequence[memoryview], then: Then) -> Part:
        """Return a request of our own; `then` gets its status."""
        return self.pool.take(op, offset, length, iov, tell, then)

    def to_file(self, request: Request, place: int) -> None:
        """Have a request done at `place` of the file that has the clusters; it ends with the file's status."""
        self._to_file.append(self.ours(request, place))

    def to_parent(self, request: Request) -> None:
        """Have a request done by the parent."""
        self._to_parent.append(request)

    def ours(self, request: Request, place: int) -> Request:
        """Return a request of our own that stands for `request` at `place` of a file."""
        ours = self.free.pop() if self.free else self.another()
        ours.op, ours.offset, ours.length = request.op, place, request.length
        ours.iov, ours.tag, ours.status = request.iov, request, PENDING
        return ours

    def another(self) -> Request:
        """Return a new request of our own, for `moved`."""
        request = Request()
        self.moved.append(request)
        return request

    # Reads, writes, and the order in which they become durable.

    def write_data(self, place: int, iov: Sequence[memoryview], then: Then) -> None:
        """Write to clusters, or to parts of them."""
        self.to_file(self.part(Op.WRITE, place, sum(map(len, iov)), iov, then), place)

    def read_meta(self, place: int, length: int, then: Callable[[int, memoryview], None]) -> None:
        """Read from the image; beyond its end there are zeros."""
        view = allocate(length)
        self._to_image(self.pool.take(Op.READ, place, length, [view], tell_with, (then, view)), place)

    def write_meta(self, place: int, data: bytes, then: Then) -> None:
        """Write to the image's tables or headers."""
        pages = self._pages
        page = pages.pop() if pages and len(data) <= PAGE else allocate(max(len(data), PAGE))
        page[: len(data)] = data
        iov, ended = [page[: len(data)]], partial(self._meta_written, page, then)
        self._to_image(self.part(Op.WRITE, place, len(data), iov, ended), place)

    def sync(self, then: Then) -> None:
        """Make completed writes durable; callers that ask at the same time share one flush."""
        self._sync.want(then)

    def order(self, then: Then) -> None:
        """Make completed writes durable before those that follow; skipped in a draft (`Env.is_draft`)."""
        if self._disk.env.is_draft:
            self.soon(partial(then, 0))
        else:
            self._sync.want(then)

    def sync_data(self, then: Then) -> None:
        """Make completed writes to clusters durable, as `sync` does."""
        self._sync_data.want(then)

    def when_quiet(self, then: Callable[[], None]) -> None:
        """Call `then` when all requests that the files have now are back, so that none uses an old place any more."""
        if out := {request for request in self.moved if request.status == PENDING}:
            self._watches.append((out, then))
        else:
            then()

    # Deferred calls.

    def soon(self, call: Callable[[], None]) -> None:
        """Call `call` before the outermost call ends, when all collected requests have been sent."""
        self._soon.append(call)

    def in_thread(self, function: Callable[[], None], then: Then) -> None:
        """Call a function that blocks in a thread; `then` gets 0, or the errno of its OSError."""
        result = [0]

        def run() -> None:
            try:
                function()
            except OSError as error:
                result[0] = error.errno or errno.EIO

        def finish() -> None:
            then(result[0])
            self.send()

        self._disk.env.run_in_thread(run, finish)

    def pause(self, then: Then) -> None:
        """Let other requests have their turn before `then` is called."""
        self.in_thread(_nothing, then)

    def send(self, moved: Sequence[Request] = ()) -> None:
        """Send `moved` and all that was collected until nothing is left, unless an outer call is doing so."""
        self._to_file += moved
        if self._is_sending:
            return
        self._is_sending = True
        try:
            while self._send_one():
                pass
        finally:
            self._is_sending = False

    def returned(self, batch: list[Request]) -> None:
        """Give back the requests of the layer above, and continue with our own."""
        if not (self.pool.lent or self._soon):
            self._disk.complete(batch)
            return
        for request in batch:
            self.finish(request, request.status)
        self.send()

    def _send_one(self) -> bool:
        if self._to_file:
            batch, self._to_file = self._to_file, []
            self.data.submit(batch)
        elif self._to_tables:
            batch, self._to_tables = self._to_tables, []
            self.file.submit(batch)
        elif self._to_parent:
            batch, self._to_parent = self._to_parent, []
            self._disk.next.submit(batch)  # type: ignore[union-attr]  # nothing is sent to a parent that there is not
        elif self._finished:
            batch, self._finished = self._finished, []
            self._disk.complete(batch)
        elif self._soon:
            calls, self._soon = self._soon, []
            for call in calls:
                call()
        else:
            return False
        return True

    def _from_file(self, batch: list[Request]) -> None:
        """Take requests back from a file. This loop runs for every request."""
        done = []
        for ours in batch:
            request = ours.tag
            request.status = ours.status
            ours.iov = ours.tag = ()  # a view that is kept would keep a guest's memory mapped
            done.append(request)
        if self._watches:
            self._notice(batch)
        self.free += batch
        self.returned(done)

    def _notice(self, batch: list[Request]) -> None:
        """Call those who wait by `when_quiet`, as far as these were the last requests that they waited for."""
        watches, self._watches = self._watches, []
        for out, then in watches:
            out.difference_update(batch)
            if out:
                self._watches.append((out, then))
            else:
                self.soon(then)

    def _joined(self, part: Part) -> None:
        join: Join = part.tag
        join.left -= 1
        join.status = join.status or part.status
        if not join.left:
            self.finish(join.request, join.status)

    def _to_image(self, request: Request, place: int) -> None:
        (self._to_tables if self.is_apart else self._to_file).append(self.ours(request, place))

    def _meta_written(self, page: memoryview, then: Then, status: int) -> None:
        if len(page) == PAGE:
            self._pages.append(page)
        then(status)

    def _flush_data(self, then: Then) -> None:
        self.to_file(self.part(Op.FLUSH, 0, 0, (), then), 0)

    def _flush_both(self, then: Then) -> None:
        """Flush the clusters, then the tables, which may refer to them."""
        self._flush_data(partial(self._flush_image, then))

    def _flush_image(self, then: Then, status: int) -> None:
        if status:
            then(status)
        else:
            self._to_image(self.part(Op.FLUSH, 0, 0, (), then), 0)


def _nothing() -> None:
    """Do nothing: the function of `pause`."""
