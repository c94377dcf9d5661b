"""The messages between a supervisor and a worker, as plain values; `protocol.codec` makes datagrams of them.

Must not open a socket. Descriptors travel beside a supervisor's message (SCM_RIGHTS), in the order that its docstring
gives. A worker sends none: closing one that storage stands behind could take for ever.

    supervisor                                  worker
      Open, Serve, Leave, Close, Report   ->
                                          <-      Standing    once it has taken one, and after each change
      Ask                                 ->
                                          <-      Reply       exactly one for each id
                                          <-      Drop, Disconnected, Log   at any time

An order (`Open` to `Report`) has a larger number than all earlier orders, of any service. A `Standing` has the number
of the last order that the worker has taken: the supervisor uses it only if that is the supervisor's last order. It says
everything about where the worker stands, and no other message reports changes of that. So a worker that an earlier
service started is no special case: it gets a `Report`.

A question (`Ask`) has an id of its own and gets exactly one `Reply`. Either side may ask the other.

A newer service never speaks to a worker of another VERSION: it replaces the worker by means of its journal. So a change
of these classes needs a new VERSION, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from xenbackend.counters import MOST_FIGURES
from xenbackend.protocol.codes import Code

VERSION = 6
MAX_MESSAGE = 256 * 1024  # bytes of one datagram
MAX_MEMORIES = 64  # that are kept for one vbd at most
SENTENCE_MAX = 4000  # characters of any sentence
MAX_LAYERS = 64  # of an open chain, with the parents of its source
MAX_FACTS = 64  # of one layer
MAX_WALLS = 32
MOST = "most"  # in a field's metadata: how many items it may have, if fewer than any list


class Stage(StrEnum):
    """How far a worker has come."""

    IDLE = "idle"  # the chain is not open
    OPEN = "open"  # the chain is open, or was probed because somebody else has its lock
    CONNECTING = "connecting"  # it waits for the image's lock, or for the end of the export
    SERVING = "serving"
    LEAVING = "leaving"  # it waits for requests in flight, flushes and unmaps


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
    may_wait: bool = False  # if the image is locked, only probe it, and open it when a ring is to be connected
    export: str = ""  # path of the socket on which the disk is exported by NBD until `Serve`; empty: none
    policy: str = ""  # `block.policy`: what becomes of requests that fail
    is_paused: bool = False  # by an administrator


@dataclass(frozen=True, slots=True)
class RingParameters:
    """One ring as the frontend offers it."""

    grefs: list[int]
    event_channel: int


@dataclass(frozen=True, slots=True)
class Connect:
    """What was agreed with a frontend; whatever was not offered to it is refused."""

    protocol: str  # "x86_64-abi", "x86_32-abi"
    rings: list[RingParameters]
    persistent: bool
    can_discard: bool = True  # if the disk can
    max_segments: int = 256  # of an indirect request
    goes_on: bool = False  # the frontend is in service already: continue its rings after their last answers


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a worker leaves in its journal (AGREED), for its successor and the service; never sent.

    chain    the chain in service, or the last one
    connect  what was agreed with the frontend, None once that is left
    order    number of the operator's order that put the chain in, 0 if there was none
    """

    chain: str
    connect: Connect | None
    order: int = 0


@dataclass(frozen=True, slots=True)
class Serve:
    """Map the rings and serve. Without `connect`: continue where a predecessor stopped, as the journal tells.

    Descriptors: the socket of an opener, if `Open` said that the worker may wait for the image.
    """

    number: int
    connect: Connect | None


@dataclass(frozen=True, slots=True)
class Leave:
    """Take nothing new, finish what is in flight, flush, unmap; the chain stays open."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """Leave the frontend if it is served, close the chain, end.

    `hands_over`: what was agreed with the frontend stays in the journal, and requests held back stay unanswered.
    `goes_on`: there is no successor, but the frontend stays connected. Requests held back go back into the ring, where
    a later service finds them. Otherwise they are answered with an error.
    """

    number: int
    hands_over: bool = False
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Say where you stand."""

    number: int


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What one layer reports about itself; in lists the top layer comes first."""

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
    facts: dict[str, str] = field(default_factory=dict, metadata={MOST: MAX_FACTS})
    # Names; the values are in the counters' page.
    figures: list[str] = field(default_factory=list, metadata={MOST: MOST_FIGURES})


@dataclass(frozen=True, slots=True)
class Standing:
    """Everything about where a worker stands.

    number        of the last order that it has taken
    stage         how far it has come
    failure       why that order could not be done, with `errno`; empty: it was done, or is under way
    is_mistake    the failure is a mistake in the chain's text or files, as `Code.INVALID` is one of a request
    chain         the one that is open, or would be; `layers` top first, empty while it is not open
    export        path of the socket on which a device model is served; empty if none is
    halted        a sentence: which ring the frontend has broken, and how
    flush_failed  a sentence if a flush failed: nothing is taken from the rings until `Resume`
    trouble       a sentence: which request the disk could not do, and that it is tried again
    is_paused     an administrator has paused the disk
    walls         those around the worker (`walls.raising.Wall`); `no_walls`: why others are not up, by wall; `needs`:
                  what was left open because a driver declares that it needs it
    wants_connections   a layer has lost a connection, and needs a `Reconnect`
    """

    number: int
    stage: Stage
    chain: str
    read_only: bool
    shareable: bool
    layers: list[LayerFacts] = field(default_factory=list, metadata={MOST: MAX_LAYERS})
    failure: str = ""
    errno: int = 0
    is_mistake: bool = False
    export: str = ""
    halted: str = ""
    flush_failed: str = ""
    trouble: str = ""
    is_paused: bool = False
    walls: list[str] = field(default_factory=list, metadata={MOST: MAX_WALLS})
    no_walls: dict[str, str] = field(default_factory=dict, metadata={MOST: MAX_WALLS})
    needs: list[str] = field(default_factory=list, metadata={MOST: MAX_WALLS})
    wants_connections: bool = False


@dataclass(frozen=True, slots=True)
class Swap:
    """Serve the guest through another chain from now on; if that cannot be opened, go on with the present one.

    The other chain must have the image to which the present one writes, by identity, unless `replaces`. With
    `is_dry_run` it is only probed: the reply's `data` is a JSON list of its layers' texts.

    `order` is the number of the operator's order, which the worker writes to AGREED once the exchange is done. With
    `is_resize` the other chain is the present one, with the same files, whatever their names mean now.
    """

    chain: str
    replaces: bool = False
    is_dry_run: bool = False
    order: int = 0
    is_resize: bool = False


@dataclass(frozen=True, slots=True)
class Branch:
    """Make a new image over the one that is written to; `format` may be empty: a format that fits is chosen.

    The reply's `data` is the text of the chain with the new image. If `own_snapshot` finds a name in `file`, it is not
    a file: the image itself keeps a snapshot under that name, and the reply has no data.
    """

    file: str
    format: str


def own_snapshot(file: str) -> str | None:
    """Return the name under which an image itself is to keep a snapshot (``@NAME``); None if `file` is a file."""
    return file[1:] if file.startswith("@") else None


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Replace the connections that layers have lost; the reply comes when the opener has been asked for all of them."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Take nothing from the rings until `Resume`; the reply comes when nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Continue after `Pause` or a failed flush, and try failed requests again now."""


@dataclass(frozen=True, slots=True)
class SetPolicy:
    """Use another policy for requests that fail (`block.policy`)."""

    policy: str


@dataclass(frozen=True, slots=True)
class Command:
    """An operator's verb for one layer, named by its driver or its index in the chain; `data` is the layer's answer."""

    layer: str
    verb: str
    arguments: list[str]


@dataclass(frozen=True, slots=True)
class Measure:
    """Time the chain's layers for so long; the reply comes afterwards, with JSON for `block.timed.parse_times`.

    A measurement that is under way ends first, and its reply has the times so far; 0 does nothing else.
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
    """The reply to the question with this id; `sentence` says why the code is not `Code.OK`, `data` is latin-1."""

    id: int
    code: Code
    sentence: str = ""
    data: str = ""


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a memory (`opening.MakeMemory`): no layer wants it any longer."""

    name: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection was closed with nothing under way: it need not be kept for a successor.

    `inode` is that of its socket (inode(7)): another connection with the same server and place may be kept by now.
    """

    server: str
    place: int
    inode: int


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the service's log."""

    level: str
    event: str
    unsaid: int = 0  # lines before it that exceeded the worker's budget


Order = Open | Serve | Leave | Close | Report
FromSupervisor = Order | Ask | Reply
FromWorker = Standing | Ask | Reply | Drop | Disconnected | Log
Message = Order | Ask | Reply | Standing | Drop | Disconnected | Log
