"""The contract between layers: what a block driver is, and the base classes that a driver's author may build on.

Must not build chains, parse text, or open a file.

Life of a driver:

    options parsed ── the chain can still be refused, and nothing has been touched
      │
    open      the source first, then its parents one by one (read-only), then the filters from the bottom up;
      │       each layer sees the geometry of the layer below before it returns its own
    submit / complete        any number of times; never more requests in flight than the rings hold
      │
    (nothing is in flight any more)
      │
    close     the top layer first

Rules, numbered so that tests and messages can name them:

D1  A request is lent from `submit` until `complete`. Each one is given back exactly once, with `status >= 0`.
D2  Lists of requests are never empty, and belong to the callee after the call: read one before you pass it on.
D3  `submit` does not sleep. Slow calls go through `env.files` or `env.run_in_thread`; memory copies and page-cache
    reads are not slow. (`sync:` breaks this rule on purpose and says so.)
D4  Requests in flight are unordered. A FLUSH covers the writes that were *completed* before it was submitted.
D5  `complete` may be called from inside `submit`. The engine never submits from `complete`; a filter may submit
    further requests of its own from `on_complete`, a bounded number for each request from above.
D6  `status` is 0 or a positive errno. EOPNOTSUPP means that this layer never does this operation. Three statuses make
    the disk wait, the first two whatever the policy says. IMAGE_DAMAGED: the write would have destroyed more of the
    image, and nothing was written. CACHE_LOST: only a cache file has data that were answered, and it cannot be used
    now. AWAY: the layer's server is away, so nobody knows whether the request was done; it will be submitted again.
D7  The bytes under `iov` may belong to a guest, which can change them while you look. Copy before you check.
D8  An exception out of `submit` or `on_complete` is a bug of that layer: it is logged with the layer's name, and the
    requests of the batch that the layer still holds end with EIO. An exception out of a callback that the layer gave
    to its `Env` is a bug, too: if a layer's callbacks keep failing, none of them is called any more, and the disk
    pauses. Report a failure that can be expected as a `status`.
D9  Bytes are the only unit.
D10 Every layer has exactly one layer above it.
D11 The process may be killed between any two instructions, and its successor gets the requests that were in flight
    again. So data that were given back with status 0 must be in something that outlives the process (a file,
    `env.memory`), and doing a request twice must have the same effect as doing it once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from xenbackend.block.env import Env as Env  # the author of a driver imports everything from here
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.files import File as File
from xenbackend.block.files import FileFacts as FileFacts
from xenbackend.block.files import Files as Files
from xenbackend.block.files import Found as Found
from xenbackend.block.files import HostFile as HostFile
from xenbackend.block.files import Lookup as Lookup
from xenbackend.block.request import Complete as Complete
from xenbackend.block.request import Request
from xenbackend.errors import DriverError

API = 2  # the version of this contract; a third party's driver names the one it was written for

# What a driver may need in addition to the files that `Env.files` opens. "files": it reads files that everybody may
# read. "network": it makes connections by IP. "ceph": the system calls of Ceph's libraries.
NEEDS = {"ceph", "files", "network"}

Look = Callable[[int, int], bytes]  # (offset, length) in bytes: reads from the layer below. Raises: OSError


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a layer tells the layer above it about its disk: sizes in bytes, and which operations it can do."""

    size: int
    sector_size: int = 512
    read_only: bool = False
    can_flush: bool = True
    can_discard: bool = False
    discard_granularity: int = 0
    discard_alignment: int = 0
    physical_sector_size: int = 0  # the medium's unit of writing, if known; at least `sector_size` once constructed

    def __post_init__(self) -> None:
        """Raise `physical_sector_size` to `sector_size`, so that a layer may leave it out if it does not know it."""
        object.__setattr__(self, "physical_sector_size", max(self.physical_sector_size, self.sector_size))


@dataclass(frozen=True, slots=True)
class ParentRef:
    """The image that an image names as its parent: `text` is a layer's text, such as ``vhd:/img/base.vhd``."""

    text: str


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a driver that has none."""


class Driver:
    """A layer of a chain: a source, which holds data, or a `Filter`, which is in front of another layer.

    Subclasses set `name`, may declare an `Options` dataclass (`xenbackend.block.options`), and implement `open`,
    `submit` and `close`. A layer that wants to see the requests that the layer below gives back also implements
    `on_complete`; without it, the chain connects the layer below directly to this layer's own `complete`.
    """

    name: ClassVar[str] = ""
    api: ClassVar[int] = API
    is_filter: ClassVar[bool] = False
    reading: ClassVar[frozenset[str]] = frozenset()  # verbs of `control` that only read, and so count as no orders
    Options: ClassVar[type] = NoOptions
    needs: ClassVar[frozenset[str]] = frozenset()  # a subset of NEEDS: what the worker's walls leave open for it

    def __init__(self, options: Any) -> None:
        """Keep the parsed options; nothing is opened yet."""
        self.options = options
        self.env: Env  # set by the chain before `open`
        self.next: Driver | None = None  # set by the chain: the layer below before `open`, or a parent after it
        self.below: Geometry | None = None  # set by the chain together with `next`: the geometry of that layer
        self.parent: ParentRef | None = None  # set by `open` if the image names a parent
        self.complete: Complete = _not_wired

    on_complete: Complete | None = None

    @classmethod
    def prepare(cls) -> None:
        """Load what can be loaded neither behind the walls nor in the zygote, such as a shared library.

        Called once in a worker whose chain has a driver with `needs`, before its walls go up, and nowhere else.

        Raises: DriverError. The caller ignores it, since `open` will fail for the same reason.
        """

    def open(self, env: Env) -> Geometry:
        """Open this layer's image or server, and return its geometry.

        Raises: DriverError, or OSError with the errno of the call that failed.
        """
        raise NotImplementedError

    def check_parent(self, parent: Geometry) -> None:
        """Check the parent that the chain opened for `self.parent`. Raises: DriverError to refuse it."""

    def submit(self, batch: list[Request]) -> None:
        """Take requests, and give each of them back by `self.complete`, now or later."""
        raise NotImplementedError

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:
        """Yield the extents of this layer's own disk, in order and without gaps; those of a parent are not included.

        For commands that look at images: it may block, and nothing is in flight. By default everything is data.

        Args:
            size: size of the disk in bytes.
            all_holes: look for holes of the file in all data of the image. If false, do so only in images that were
                made with room for data that are not there yet (preallocated), as QEMU does.

        Raises: DriverError if a table is damaged; OSError.
        """
        yield Extent(0, size, Kind.DATA)

    def changes(self, since: str, size: int) -> Iterator[Extent]:
        """Yield the extents of this layer's disk that changed since the snapshot named `since`; the others are ABSENT.

        Otherwise like `extents`. Raises: DriverError if the layer cannot know that.
        """
        raise DriverError("it does not know what was changed since a snapshot", layer=self.name, errno=errno.EOPNOTSUPP)

    def snapshot(self, name: str) -> None:
        """Make a snapshot of this source's disk, named `name`, by the source's own means, while it is in service.

        Called from a thread; it may take seconds. Raises: DriverError, also if the source has no snapshots.
        """
        raise DriverError("it has no snapshots of its own", layer=self.name, errno=errno.EOPNOTSUPP)

    def writer(self) -> str:
        """Return who else may be writing to this source's disk, which we opened for reading and without a lock.

        Empty if nobody can write to it, or if that is not known.
        """
        return ""

    def content(self) -> str:
        """Return a text that identifies the disk of a source that has no files; empty if the layer's own text does.

        For a disk on a server it says which server and which of its disks, and nothing about how the disk is used.
        """
        return ""

    def identify(self) -> bytes:
        """Return the UUID by which a child's image identifies this one as its parent: 16 bytes, all zeros if none.

        Raises: ConfigError if the layer of a child could not open this image.
        """
        return bytes(16)

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Execute an operator's verb on this layer while it is in service, and return the answer.

        Raises: DriverError, with EOPNOTSUPP for an unknown verb.
        """
        raise DriverError(f"does not know the verb {verb!r}", layer=self.name, errno=errno.EOPNOTSUPP)

    def release(self) -> None:
        """Pass on at once all requests that this layer holds back: somebody is waiting until nothing is in flight.

        May be called again when more requests have come. Only a layer that delays requests on purpose has to do
        anything here.
        """

    def figures(self) -> dict[str, int]:
        """Return this layer's figures, for `status` and metrics: name to number, the same names while it is open.

        Numbers are from 0 to 2**64 - 1, and count from when the layer was opened. Called once a second.
        """
        return {}

    def close(self) -> None:
        """Release everything; nothing is in flight."""


def _not_below(offset: int, length: int) -> bytes:
    raise RuntimeError(f"looked at {length} bytes at {offset} where no chain is being opened")


def _not_wired(batch: list[Request]) -> None:
    raise RuntimeError(f"completed before the chain was wired: {batch!r}")


class Filter(Driver):
    """A layer in front of another one. This class itself passes everything on."""

    is_filter = True
    is_transparent: bool = False  # a read returns the data that the layer below has
    may_answer_alone: bool = False  # a write may be answered while only this layer has its data
    keeps_writes: ClassVar[bool] = False  # it keeps all writes itself, so the layers below are opened for reading only

    def __init__(self, options: Any) -> None:
        """See `Driver`."""
        super().__init__(options)
        self.look: Look = _not_below  # set by the chain before `open`; may be called in `open` only

    def open(self, env: Env) -> Geometry:
        """Return the geometry of the layer below."""
        assert self.below is not None  # noqa: S101 - the chain opens a filter after the layer below it
        return self.below

    def submit(self, batch: list[Request]) -> None:
        """Pass the batch on."""
        self.next.submit(batch)  # type: ignore[union-attr]  # a filter in a chain has a layer below


class SimpleDriver(Driver):
    """A source that does one request after the other, within `submit`.

    A subclass implements `read` and `write`, and `flush` and `discard` if it has any. An OSError that one of them
    raises becomes the request's status, so the subclass needs no error handling.
    """

    def submit(self, batch: list[Request]) -> None:
        """Do each request, then give back all of them."""
        steps = (self.read, self.write, self.flush, self.discard)
        for request in batch:
            try:
                steps[request.op](request)
                request.status = 0
            except OSError as error:
                request.status = error.errno or errno.EIO
        self.complete(batch)

    def read(self, request: Request) -> None:
        """Fill `request.iov` with the data from `request.offset` on. Raises: OSError."""
        raise OSError(errno.EOPNOTSUPP, "read")

    def write(self, request: Request) -> None:
        """Store the data of `request.iov` from `request.offset` on. Raises: OSError."""
        raise OSError(errno.EOPNOTSUPP, "write")

    def flush(self, request: Request) -> None:
        """Make completed writes durable. A driver without a volatile cache need not override it. Raises: OSError."""

    def discard(self, request: Request) -> None:
        """Discard the request's range. Raises: OSError."""
        raise OSError(errno.EOPNOTSUPP, "discard")


class BlockingDriver(SimpleDriver):
    """A `SimpleDriver` whose methods may sleep: requests are done in threads of the worker's pool, in any order."""

    def submit(self, batch: list[Request]) -> None:
        """Have each request done in a thread, and give it back from the worker's loop."""
        for request in batch:
            self.env.run_in_thread(partial(self._do, request), partial(self.complete, [request]))

    def _do(self, request: Request) -> None:
        step = (self.read, self.write, self.flush, self.discard)[request.op]
        try:
            step(request)
            request.status = 0
        except OSError as error:
            request.status = error.errno or errno.EIO
