"""The contract between layers: what a block driver is, and the bases that its author may start from.

Must not build chains, parse text, or open a file.

Life of a driver:

    options parsed ── the chain can still be refused with nothing touched
      │
    open      the source first, then its parents one by one (read-only), then the filters upward;
      │       each sees the geometry of the layer below before it answers with its own
    submit / complete        any number; never more in flight than the rings hold
      │
    (drained: nothing in flight)
      │
    close     the top layer first

Rules, numbered so that tests and messages can name them:

D1  A request is lent from `submit` until `complete`; each is given back exactly once, with `status >= 0`.
D2  Lists are never empty and belong to the callee after the call: look before you pass on.
D3  `submit` does not sleep. Slow calls go through `env.files` or `env.run_in_thread`; memory copies and page-cache
    reads are not slow. (`sync:` breaks this rule on purpose and says so.)
D4  Requests in flight are unordered. FLUSH covers the writes that were *completed* before it was submitted.
D5  `complete` may be called from inside `submit`. The engine never submits from `complete`; a filter may send
    its own further steps down from `on_complete`, boundedly many per request.
D6  `status` is 0 or a positive errno; EOPNOTSUPP means "this layer never does this operation", IMAGE_DAMAGED
    that a write would destroy more of its image, and nothing was written: the disk pauses, whatever the policy says;
    CACHE_LOST that only a file has what was answered, and cannot be used now: it waits, whatever the policy says;
    AWAY that the layer's server is away, so that nobody knows whether it was done: it waits, and comes again.
D7  The bytes under `iov` may belong to a guest and change while you look. Copy before you check.
D8  An exception out of `submit` or `on_complete` is a bug of that layer: it is logged with the layer's name, and
    what the layer still holds of the batch ends with EIO. Expected failures are a `status`. So is one out of a callback
    that a layer gave to its `Env`; a layer whose callbacks fail again and again is stopped, and the disk pauses.
D9  Bytes are the only unit.
D10 Every layer has exactly one layer above it.
D11 The process may be killed between any two instructions, and what was in flight comes again to its successor: what
    was given back with status 0 must be kept by something that outlives the process (a file, `env.memory`), and to do
    a request twice must be the same as to do it once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from xenbackend.block.env import Env as Env  # noqa: PLC0414 - whoever writes a driver imports all of it from here
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.files import File as File  # noqa: PLC0414
from xenbackend.block.files import FileFacts as FileFacts  # noqa: PLC0414
from xenbackend.block.files import Files as Files  # noqa: PLC0414
from xenbackend.block.files import Found as Found  # noqa: PLC0414
from xenbackend.block.files import Lookup as Lookup  # noqa: PLC0414
from xenbackend.block.request import Complete as Complete  # noqa: PLC0414
from xenbackend.block.request import Request
from xenbackend.errors import DriverError

API = 2  # the version of this contract; a third party's driver names the one it was written for

# What a driver may need beside what `Env.files` opens: to read the files that anybody may; connections by IP; what
# Ceph's library asks the kernel for.
NEEDS = {"ceph", "files", "network"}

Look = Callable[[int, int], bytes]  # offset and length in bytes: what the layer below has there. Raises: OSError


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a layer tells the layer above it: sizes in bytes, and what it can do."""

    size: int
    sector_size: int = 512
    read_only: bool = False
    can_flush: bool = True
    can_discard: bool = False
    discard_granularity: int = 0
    discard_alignment: int = 0
    physical_sector_size: int = 0  # what the medium writes at once, as far as it is known; never less than a sector

    def __post_init__(self) -> None:
        """Let a layer that knows nothing of the medium leave it out."""
        object.__setattr__(self, "physical_sector_size", max(self.physical_sector_size, self.sector_size))


@dataclass(frozen=True, slots=True)
class ParentRef:
    """The image that an image names as its parent: `text` is a layer's text, such as ``vhd:/img/base.vhd``."""

    text: str


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a driver that has none."""


class Driver:
    """A layer of a chain: either a source (holds data) or, as a `Filter`, in front of another layer.

    Subclasses set `name`, may declare an `Options` dataclass (`xenbackend.block.options`), and write `open`, `submit`
    and `close`. A layer that wants to see what the layer below gives back also writes `on_complete`; where it is
    absent the chain wires the layer below straight to this layer's own `complete`.
    """

    name: ClassVar[str] = ""
    api: ClassVar[int] = API
    is_filter: ClassVar[bool] = False
    reading: ClassVar[frozenset[str]] = frozenset()  # verbs of `control` that only read: whoever polls gives no orders
    Options: ClassVar[type] = NoOptions
    needs: ClassVar[frozenset[str]] = frozenset()  # of NEEDS: what the worker's walls leave open; all else is refused

    def __init__(self, options: Any) -> None:
        """Keep the parsed options; nothing is opened yet."""
        self.options = options
        self.env: Env  # set by the chain before `open`
        self.next: Driver | None = None  # set by the chain before `open`: the layer below, or later the parent
        self.below: Geometry | None = None  # set by the chain with it: what that layer answered
        self.parent: ParentRef | None = None  # set by `open` when the image says that it has one
        self.complete: Complete = _not_wired

    on_complete: Complete | None = None

    @classmethod
    def prepare(cls) -> None:
        """Load what cannot be loaded behind walls, nor in the process that workers are forked from: a library.

        Called once in a worker whose chain has a driver with `needs`, before its walls go up; elsewhere never. Raises:
        DriverError, which is nobody's business before `open` finds the same.
        """

    def open(self, env: Env) -> Geometry:
        """Open what this layer stands for. Raises: DriverError, or OSError with the errno of the call that failed."""
        raise NotImplementedError

    def check_parent(self, parent: Geometry) -> None:
        """Look at the parent that the chain opened for `self.parent`. Raises: DriverError to refuse it."""

    def submit(self, batch: list[Request]) -> None:
        """Take requests; give each back by `self.complete`, now or later."""
        raise NotImplementedError

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:
        """Yield what this layer has itself of its disk, in order and without gaps; nothing of a parent's.

        For commands that look at images: it may block, and nothing is in flight. By default all of it is data.

        Args:
            size: bytes of the disk.
            all_holes: ask the file for holes in all that the image has; else only in images that were made with room
                for data which are not there yet, as QEMU does.

        Raises: DriverError, where a table is damaged; OSError.
        """
        yield Extent(0, size, Kind.DATA)

    def changes(self, since: str, size: int) -> Iterator[Extent]:
        """Yield what this layer's disk has got since a snapshot of that name; ABSENT is what has not changed.

        Otherwise as `extents`. Raises: DriverError, where nothing is known of that.
        """
        raise DriverError("it does not know what was changed since a snapshot", layer=self.name, errno=errno.EOPNOTSUPP)

    def snapshot(self, name: str) -> None:
        """Keep what this source's disk holds now, under a name, by its own means; it is in service meanwhile.

        Called from a thread; it may take seconds. Raises: DriverError, also where it has no such means.
        """
        raise DriverError("it has no snapshots of its own", layer=self.name, errno=errno.EOPNOTSUPP)

    def writer(self) -> str:
        """Return who may write to this source's disk while we, who opened it to be read, have no lock against that.

        Empty: nobody can, or nobody knows.
        """
        return ""

    def content(self) -> str:
        """Return what tells the disk of a source without files from any other; empty: its text does.

        For a disk on a server: which server and which of its disks, and nothing of how it is used.
        """
        return ""

    def identify(self) -> bytes:
        """Return the UUID by which the image of a child knows this one: 16 bytes, zeros where there is no such thing.

        Raises: ConfigError, where a child's layer could not open this one.
        """
        return bytes(16)

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Do what an operator asks of this layer in service. Raises: DriverError for an unknown verb."""
        raise DriverError(f"knows no verb {verb!r}", layer=self.name, errno=errno.EOPNOTSUPP)

    def release(self) -> None:
        """Pass on now whatever this layer holds back: somebody waits until nothing is in flight.

        It may be called again when more has come. Only a layer that holds requests back on purpose has anything to do.
        """

    def figures(self) -> dict[str, int]:
        """Return what this layer counts, for `status` and metrics: by names that stay the same while it is open.

        Numbers from 0 to 2**64 - 1. It is called once a second, and counts for one opening.
        """
        return {}

    def close(self) -> None:
        """Release everything; nothing is in flight."""


def _not_below(offset: int, length: int) -> bytes:
    raise RuntimeError(f"looked at {length} bytes at {offset} where no chain is being opened")


def _not_wired(batch: list[Request]) -> None:
    raise RuntimeError(f"completed before the chain was wired: {batch!r}")


class Filter(Driver):
    """A layer in front of another one; as it stands it passes everything on."""

    is_filter = True
    is_transparent: bool = False  # what is read from it is what the layer below has
    may_answer_alone: bool = False  # a write may be answered while only this layer has it
    keeps_writes: ClassVar[bool] = False  # all that is below is opened for reading only

    def __init__(self, options: Any) -> None:
        """See `Driver`."""
        super().__init__(options)
        self.look: Look = _not_below  # set by the chain before `open`, and of use in `open` only

    def open(self, env: Env) -> Geometry:
        """Answer with the geometry of the layer below."""
        assert self.below is not None  # noqa: S101 - the chain opens a filter after the layer below it
        return self.below

    def submit(self, batch: list[Request]) -> None:
        """Pass the batch on."""
        self.next.submit(batch)  # type: ignore[union-attr]  # a filter in a chain has a layer below


class SimpleDriver(Driver):
    """A source that does one request at a time, at once: write `read` and `write`, and `flush` and `discard` if any.

    An OSError becomes the request's status, so that an author writes no error handling.
    """

    def submit(self, batch: list[Request]) -> None:
        """Do each request, then give all of them back."""
        steps = (self.read, self.write, self.flush, self.discard)
        for request in batch:
            try:
                steps[request.op](request)
                request.status = 0
            except OSError as error:
                request.status = error.errno or errno.EIO
        self.complete(batch)

    def read(self, request: Request) -> None:
        """Fill `request.iov` from `request.offset` on. Raises: OSError."""
        raise OSError(errno.EOPNOTSUPP, "read")

    def write(self, request: Request) -> None:
        """Store `request.iov` from `request.offset` on. Raises: OSError."""
        raise OSError(errno.EOPNOTSUPP, "write")

    def flush(self, request: Request) -> None:
        """Make completed writes durable; a driver without a volatile cache has nothing to do. Raises: OSError."""

    def discard(self, request: Request) -> None:
        """Forget the range. Raises: OSError."""
        raise OSError(errno.EOPNOTSUPP, "discard")


class BlockingDriver(SimpleDriver):
    """A `SimpleDriver` whose calls sleep: each request is done on a thread of the worker's pool, in any order."""

    def submit(self, batch: list[Request]) -> None:
        """Hand each request to a thread, and give it back from the worker's loop."""
        for request in batch:
            self.env.run_in_thread(partial(self._do, request), partial(self.complete, [request]))

    def _do(self, request: Request) -> None:
        step = (self.read, self.write, self.flush, self.discard)[request.op]
        try:
            step(request)
            request.status = 0
        except OSError as error:
            request.status = error.errno or errno.EIO
