"""What a supervisor and a worker say to each other: plain values. `protocol.codec` makes datagrams of them.

Must not open a socket. Descriptors travel beside a message (SCM_RIGHTS), in the order that its docstring gives.

    supervisor                                  worker
      Open, Serve, Leave, Close, Report   ->
                                          <-      Standing    once it has taken that, and whenever it has changed
      Ask                                 ->
                                          <-      Reply       exactly one for each id
                                          <-      Keep, Drop, Disconnected, Log   at any time

An order (`Open` to `Report`) has a number that is larger than that of any order before, of any service. A `Standing`
has the number of the last order that the worker has taken, so it tells what answers what: the supervisor goes by one
only if it has the number of the supervisor's last order. It holds all of where the worker stands, and no message
tells of a change otherwise. So a worker that an earlier service started is no special case: it is asked to `Report`.

A question (`Ask`) has an id of its own and gets exactly one `Reply`. Either side may ask the other.

A newer service replaces a worker of another VERSION by its journal, and never speaks to it. So a change of these
classes needs a new VERSION, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from xenbackend.protocol.codes import Code

VERSION = 5
MAX_MESSAGE = 256 * 1024  # bytes of one datagram
MAX_MEMORIES = 64  # that one vbd may have kept
SENTENCE_MAX = 4000  # characters of any sentence


class Stage(StrEnum):
    """How far a worker is."""

    IDLE = "idle"  # the chain is not open
    OPEN = "open"  # the chain is open, or was looked at while somebody else has its lock
    CONNECTING = "connecting"  # it waits for the image's lock, or for a device model to let go
    SERVING = "serving"
    LEAVING = "leaving"  # it drains, flushes and unmaps


@dataclass(frozen=True, slots=True)
class Open:
    """Open a chain. Descriptors: the journal, the socket of an opener (`protocol.opening`), one per name in `memories`.

    The opener also opens the devices, and listens at `export`.
    """

    number: int
    vbd: str  # for people: "vbd/5/51712"
    host: str  # for `kernel.ports.open_host`
    frontend_domid: int
    chain: str
    read_only: bool
    shareable: bool = False
    resumes: bool = False  # a guest may have written through an earlier worker
    memories: list[str] = field(default_factory=list)
    poll_us: int = 0  # how long to look for the next request before the loop sleeps
    may_wait: bool = False  # while the image is locked only look at it, and open it when a ring is to be connected
    export: str = ""  # path of the socket on which the disk is served by NBD until `Serve`; empty: none
    policy: str = ""  # `block.policy`: what becomes of requests that fail
    is_paused: bool = False  # by an administrator


@dataclass(frozen=True, slots=True)
class RingParameters:
    """One ring as the frontend offers it."""

    grefs: list[int]
    event_channel: int


@dataclass(frozen=True, slots=True)
class Connect:
    """What was agreed with a frontend; what was not offered to it is refused."""

    protocol: str  # "x86_64-abi", "x86_32-abi"
    rings: list[RingParameters]
    persistent: bool
    can_discard: bool = True  # as far as the disk can
    max_segments: int = 256  # of an indirect request
    goes_on: bool = False  # the frontend is in service already: its rings are joined where their answers end


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a worker leaves in its journal (AGREED), for its successor and the service; never sent.

    chain    that it serves through, or served through last
    connect  what was agreed with the frontend, None once that has let go
    order    by which it put that chain in, 0 where none told it to
    """

    chain: str
    connect: Connect | None
    order: int = 0


@dataclass(frozen=True, slots=True)
class Serve:
    """Map the rings and serve. Without `connect`: where a predecessor stopped, as the journal tells.

    Descriptors: the socket of an opener, where `Open` said that the worker may wait for the image.
    """

    number: int
    connect: Connect | None


@dataclass(frozen=True, slots=True)
class Leave:
    """Take nothing new, finish what is in flight, flush, unmap; the chain stays open."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """Leave if need be, close the chain, end.

    `hands_over`: what was agreed with the frontend stays in the journal, and what is held back stays unanswered.
    """

    number: int
    hands_over: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Say where you stand."""

    number: int


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What one layer said of itself when it was opened; the top layer first in a list of them."""

    text: str
    size: int
    sector_size: int
    read_only: bool
    can_flush: bool
    can_discard: bool
    discard_granularity: int
    discard_alignment: int
    physical_sector_size: int
    parent_of: str = ""  # the layer whose image named this one as its parent
    facts: dict[str, str] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)  # names of what it counts, whose values the counters' page has


@dataclass(frozen=True, slots=True)
class Standing:
    """All of where a worker stands.

    number        of the last order that it has taken
    stage         how far it is
    failure       why that order could not be done, with `errno`; empty: it could, or is on its way
    is_mistake    that is a mistake of whoever named the chain, as `Code.INVALID` is of whoever asks
    chain         the one that is open, or would be; `layers` top first, empty while it is not open
    export        path of the socket on which a device model is served, empty where none is
    halted        which ring the frontend has broken, and how
    flush_failed  a flush failed: nothing is taken from the rings any more until `Resume`
    trouble       which request the disk could not do, and that it is tried again
    is_paused     an administrator has stopped it
    walls         around the worker (`walls.raising.Wall`), `no_walls` why others are not up, by wall; `needs` what was
                  left open because a driver declares that it needs it
    wants_connections   a layer has lost a connection, and wants to be asked to `Reconnect`
    """

    number: int
    stage: Stage
    chain: str
    read_only: bool
    shareable: bool
    layers: list[LayerFacts] = field(default_factory=list)
    failure: str = ""
    errno: int = 0
    is_mistake: bool = False
    export: str = ""
    halted: str = ""
    flush_failed: str = ""
    trouble: str = ""
    is_paused: bool = False
    walls: list[str] = field(default_factory=list)
    no_walls: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    wants_connections: bool = False


@dataclass(frozen=True, slots=True)
class Swap:
    """Serve the guest through another chain from now on; if it cannot be opened, through the one that is open.

    It must have the image that the one in service writes to, by identity, unless `replaces`. With `is_dry_run` it is
    only looked at: the reply's `data` is a JSON list of its layers' texts.

    `order` is the operator's, which the worker leaves in AGREED once that is done. With `is_resize` it is the chain
    that is open, with the same files, whatever their names mean now.
    """

    chain: str
    replaces: bool = False
    is_dry_run: bool = False
    order: int = 0
    is_resize: bool = False


@dataclass(frozen=True, slots=True)
class Branch:
    """Make a new image over the one that is written to; `format` may be empty for what fits to that.

    The reply's `data` is the chain that would serve the guest through it. Where `own_snapshot` finds a name in `file`
    that is no file: the image keeps what it holds now itself, under that name, and the reply has no data.
    """

    file: str
    format: str


def own_snapshot(file: str) -> str | None:
    """Return the name under which an image itself is to keep what it holds now (``@NAME``); None: it is a file."""
    return file[1:] if file.startswith("@") else None


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Have the connections made that layers have lost; replied to when the opener has been asked for all of them."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Take nothing from the rings until `Resume`; replied to when nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Serve on after `Pause`, after a flush that failed, and try again now what failed."""


@dataclass(frozen=True, slots=True)
class SetPolicy:
    """Go by another policy (`block.policy`)."""

    policy: str


@dataclass(frozen=True, slots=True)
class Command:
    """An operator's verb for one layer, named by its driver or its index in the chain; `data` is the layer's bytes."""

    layer: str
    verb: str
    arguments: list[str]


@dataclass(frozen=True, slots=True)
class Measure:
    """Time the chain's layers for so long; replied to afterwards, with JSON for `block.timed.parse_times`.

    What another one has begun ends now, and is replied to with the times until then; 0 begins nothing else.
    """

    milliseconds: int


Question = Swap | Branch | Reconnect | Pause | Resume | SetPolicy | Command | Measure


@dataclass(frozen=True, slots=True)
class Ask:
    """A question; `id` is the asker's. Descriptors: beside `Swap`, `Branch` and `Reconnect` an opener's socket."""

    id: int
    question: Question


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the question with this id; `sentence` says why it is not `Code.OK`, `data` is latin-1."""

    id: int
    code: Code
    sentence: str = ""
    data: str = ""


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep a memory for a successor. Descriptors: the memory."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a memory: no layer wants it any more."""

    name: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection was closed in order, with nothing under way: it need not be kept for a successor.

    `inode` is its socket's (inode(7)): an opener may have had another one kept meanwhile, of the same server and place.
    """

    server: str
    place: int
    inode: int


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the service's log."""

    level: str
    event: str
    unsaid: int = 0  # lines before it that were over the worker's budget


Order = Open | Serve | Leave | Close | Report
FromSupervisor = Order | Ask | Reply
FromWorker = Standing | Ask | Reply | Keep | Drop | Disconnected | Log
Message = Order | Ask | Reply | Standing | Keep | Drop | Disconnected | Log
