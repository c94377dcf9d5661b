"""The files of a mapped disk, and requests on their way: to the files, to the parent, back to whoever sent them.

What is to be sent gathers in lists until the outermost call ends, so that batches form by themselves: nothing is
submitted in the middle of a decision, and no callback runs inside another one's loop. The image has the tables; the
file that has the clusters is the same one as a rule. Where they are two, what clusters hold is made durable before the
tables are that may name them. Must not decide where a request goes, nor know where anything lies.
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
    """Requests of a disk and of its format's own.

    A request that is handed over is a guest's own or a `Part`; `finish` ends either.

    Args:
        disk: whose requests they are; its parent is its `next`, and it has been given its `env`.
        file: the image; its completions are ours from now on.
        data: the file that has the clusters, where they are not in the image; its completions are ours as well.
    """

    def __init__(self, disk: Driver, file: File, data: File | None = None) -> None:
        self._disk = disk
        self.file = file
        self.data = data or file
        self.is_apart = data is not None
        self.pool = Pool()
        self.moved: list[Request] = []  # ours for the files: all of them; each one's tag is what it stands for
        self.free: list[Request] = []  # those of them that are not at a file
        self._to_file: list[Request] = []
        self._to_tables: list[Request] = []  # of an image whose clusters are in another file
        self._to_parent: list[Request] = []
        self._finished: list[Request] = []
        self._soon: list[Callable[[], None]] = []
        self._is_sending = False
        self._pages: list[memoryview] = []  # for writes of metadata: to map one anew costs as much as the write
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
        """End a request."""
        request.status = status
        if isinstance(request, Part) and request.pool is self.pool:
            request.done(request)
            self.pool.put(request)
        else:
            self._finished.append(request)

    def split(self, request: Request, lengths: Sequence[int]) -> Sequence[Request]:
        """Return parts of a request, one for each length in bytes; it ends when they have. One part is itself.

        What is a part itself is replaced by its parts: however often a request is cut, they all end in one step.
        """
        if len(lengths) == 1:
            return [request]
        return self.pool.split(request, lengths, self._joined)

    def part(self, op: int, offset: int, length: int, iov: Sequence[memoryview], then: Then) -> Part:
        """Return a request of our own."""
        return self.pool.take(op, offset, length, iov, tell, then)

    def to_file(self, request: Request, place: int) -> None:
        """Let the file that has the clusters do a request at `place`; it ends as the file ends it."""
        self._to_file.append(self.ours(request, place))

    def to_parent(self, request: Request) -> None:
        """Let the parent do a request."""
        self._to_parent.append(request)

    def ours(self, request: Request, place: int) -> Request:
        """Return what stands for a request at the files."""
        ours = self.free.pop() if self.free else self.another()
        ours.op, ours.offset, ours.length = request.op, place, request.length
        ours.iov, ours.tag, ours.status = request.iov, request, PENDING
        return ours

    def another(self) -> Request:
        """Return one more that is to stand for a request."""
        request = Request()
        self.moved.append(request)
        return request

    # Reading, writing, and what is durable when.

    def write_data(self, place: int, iov: Sequence[memoryview], then: Then) -> None:
        """Write clusters, or parts of them."""
        self.to_file(self.part(Op.WRITE, place, sum(map(len, iov)), iov, then), place)

    def read_meta(self, place: int, length: int, then: Callable[[int, memoryview], None]) -> None:
        """Read from the image; what is past its end is zeros."""
        view = allocate(length)
        self._to_image(self.pool.take(Op.READ, place, length, [view], tell_with, (then, view)), place)

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
        if self._disk.env.is_draft:
            self.soon(partial(then, 0))
        else:
            self._sync.want(then)

    def sync_data(self, then: Then) -> None:
        """Make durable what was completed of clusters, likewise."""
        self._sync_data.want(then)

    def when_quiet(self, then: Callable[[], None]) -> None:
        """Call when everything that the files have now is back: nobody reads or writes a place from before any more."""
        if out := {request for request in self.moved if request.status == PENDING}:
            self._watches.append((out, then))
        else:
            then()

    # Later.

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
            self.send()

        self._disk.env.run_in_thread(run, finish)

    def pause(self, then: Then) -> None:
        """Let others have their turn."""
        self.in_thread(_nothing, then)

    def send(self, moved: Sequence[Request] = ()) -> None:
        """Send what has gathered, and `moved`, until nothing is left; whoever is inside this already does it."""
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
        """Give back what is the layer's above, and go on with our own."""
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
            self._disk.next.submit(batch)  # type: ignore[union-attr]  # whoever knows its size has been given it
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
        """Take back what the file has done. This loop runs for every request."""
        done = []
        for ours in batch:
            request = ours.tag
            request.status = ours.status
            ours.iov = ours.tag = ()  # a view that is kept keeps a guest's memory
            done.append(request)
        if self._watches:
            self._notice(batch)
        self.free += batch
        self.returned(done)

    def _notice(self, batch: list[Request]) -> None:
        """Tell those who wait for requests of before that these are back."""
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
        """Flush the clusters, then the tables, which may name them."""
        self._flush_data(partial(self._flush_image, then))

    def _flush_image(self, then: Then, status: int) -> None:
        if status:
            then(status)
        else:
            self._to_image(self.part(Op.FLUSH, 0, 0, (), then), 0)


def _nothing() -> None:
    """Do nothing, in a thread."""
