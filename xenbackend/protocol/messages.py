"""The messages between supervisor and worker: plain values and their codec. One datagram holds one message.

Must not open a socket. Descriptors travel beside a message (SCM_RIGHTS), in the order that its docstring gives.

A service that was upgraded takes over workers of the program before. So within one VERSION kinds may be added, and
fields that have a default: whoever does not know a field passes over it, and one that is missing has its default.

    supervisor                                     worker
      Open (journal, memories …)      ->
                                      <-           Keep (memory)        any number, while opening
                                      <-           Opened  |  Failed
      Connect  |  Rejoin              ->
                                      <-           Connected  |  Failed
      Branch                          ->
                                      <-           Branched  |  Unswapped
      Swap                            ->
                                      <-           Swapped  |  Unswapped
      Pause                           ->
                                      <-           Held                 nothing is in flight
      Resume, Obey                    ->
      Report                          ->
                                      <-           Standing
      Command                         ->
                                      <-           Reply
                                      <-           Log, Halted, Paused, Trouble, Keep, Drop   at any time
      Disconnect                      ->
                                      <-           Disconnected         drained, flushed, unmapped
      Close                           ->
                                      <-           Closed               and the process ends
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

VERSION = 2
MAX_MESSAGE = 256 * 1024  # bytes of one datagram
MAX_MEMORIES = 64  # that one vbd may have kept


@dataclass(frozen=True, slots=True)
class Open:
    """Open a chain. Descriptors: the journal, then one per name in `memories`."""

    vbd: str  # for people: "vbd/5/51712"
    host: str  # for `kernel.ports.open_host`
    frontend_domid: int
    chain: str
    read_only: bool
    shareable: bool = False
    resumes: bool = False  # a guest may have written through an earlier worker
    memories: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    may_wait: bool = False  # while the image is locked only look at it, and open it when a ring is to be connected
    export: str = ""  # path of a Unix socket on which the disk is served by NBD until `Connect`; empty: none
    policy: str = ""  # `block.policy`: what becomes of requests that fail
    lost: str = ""  # a flush failed earlier, and what was lost: serve nothing until `Resume`
    is_paused: bool = False  # by an administrator


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
    parent_of: str = ""  # the layer whose image named this one as its parent
    facts: dict[str, str] = field(default_factory=dict)
    physical_sector_size: int = 0  # 0: not known, by a worker of an older program


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
class Opened:
    """The chain is open; `layers` top first. `export` is the socket's path, empty where none is served."""

    layers: list[LayerFacts]
    export: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """What was asked could not be done; `sentence` is for the operator."""

    sentence: str
    errno: int


@dataclass(frozen=True, slots=True)
class RingParameters:
    """One ring as the frontend offers it."""

    grefs: list[int]
    event_channel: int


@dataclass(frozen=True, slots=True)
class Connect:
    """Map the rings and serve; what was not offered to the frontend is refused."""

    protocol: str  # "x86_64-abi", "x86_32-abi"
    rings: list[RingParameters]
    persistent: bool
    can_discard: bool = True  # as far as the disk can
    max_segments: int = 256  # of an indirect request
    goes_on: bool = False  # the frontend is in service already: its rings are joined where their answers end


@dataclass(frozen=True, slots=True)
class Rejoin:
    """Serve the rings on where a predecessor stopped, as the journal tells; the guest must not notice."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The rings are served from now on."""


@dataclass(frozen=True, slots=True)
class Halted:
    """A ring was stopped for good because the frontend broke it; said once per ring."""

    ring: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Paused:
    """A flush failed: nothing is taken from the rings any more until `Resume`; said once per connection."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """Requests that failed are kept and tried again; an empty sentence: all of them went through."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Swap:
    """Serve the guest through another chain from now on; if it cannot be opened, through the one that is open."""

    chain: str


@dataclass(frozen=True, slots=True)
class Branch:
    """Make a new image over the one that is written to; `format` may be empty for what fits to that."""

    file: str
    format: str


@dataclass(frozen=True, slots=True)
class Branched:
    """The image is there; `chain` would serve the guest through it."""

    chain: str


@dataclass(frozen=True, slots=True)
class Swapped:
    """The chain that was asked for is served; `layers` top first."""

    chain: str
    layers: list[LayerFacts]


@dataclass(frozen=True, slots=True)
class Unswapped:
    """The chain that was asked for is not served, the former one is; `sentence` says why."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Take nothing from the rings until `Resume`."""


@dataclass(frozen=True, slots=True)
class Held:
    """Nothing is taken and nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Serve on after `Pause`, after a flush that failed, and try again now what failed."""


@dataclass(frozen=True, slots=True)
class Obey:
    """Go by another policy (`block.policy`)."""

    policy: str


@dataclass(frozen=True, slots=True)
class Report:
    """Say where you stand: the supervisor is a new one, which knows by `id` what answers its own question."""

    id: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a worker stands. `phase` is idle, open, connecting, serving or disconnecting.

    idle: the chain is not open; connecting: it waits for the image's lock.
    """

    phase: str
    chain: str
    read_only: bool
    shareable: bool
    layers: list[LayerFacts]
    export: str
    halted: str  # the sentences of `Halted`, `Paused` and `Trouble` that hold now
    paused: str
    trouble: str
    report: int = 0  # the id of the `Report` that this answers


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Take nothing new, finish what is in flight, flush, unmap."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """Nothing is in flight or mapped any more; the chain is still open."""


@dataclass(frozen=True, slots=True)
class Close:
    """Disconnect if need be, close the chain, end.

    `hands_over`: what was agreed with the frontend stays in the journal, and what is held back stays unanswered.
    """

    hands_over: bool = False


@dataclass(frozen=True, slots=True)
class Closed:
    """The chain is closed; the process ends now."""


@dataclass(frozen=True, slots=True)
class Command:
    """An operator's verb for one layer, named by its driver or its index in the chain."""

    id: int
    layer: str
    verb: str
    arguments: list[str]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to `Command`: `data` is the layer's bytes in latin-1, or a sentence where `ok` is false."""

    id: int
    ok: bool
    data: str


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the service's log."""

    level: str
    event: str
    fields: dict[str, str]


Message = (
    Open | Keep | Drop | Opened | Failed | Connect | Rejoin | Connected | Halted | Paused | Trouble
    | Branch | Branched | Swap | Swapped | Unswapped | Pause | Held | Resume | Obey | Report | Standing
    | Disconnect | Disconnected | Close | Closed | Command | Reply | Log
)  # fmt: skip

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Open, Keep, Drop, Opened, Failed, Connect, Rejoin, Connected, Halted, Paused, Trouble,
        Branch, Branched, Swap, Swapped, Unswapped, Pause, Held, Resume, Obey, Report, Standing,
        Disconnect, Disconnected, Close, Closed, Command, Reply, Log,
    )
}  # fmt: skip
_RECORDS = {*_KINDS.values(), LayerFacts, RingParameters}


class UnknownKind(ValueError):
    """A message of a kind that we do not know, from a program that may be newer."""


def as_fields(message: Message) -> dict[str, Any]:
    """Return a message's fields as plain values."""
    return asdict(message)


def restore(kind: type[Any], fields: dict[str, Any]) -> Any:
    """Return the message that `as_fields` made plain. Raises: ValueError where it is none of that kind."""
    return _plain(kind, fields)


def encode(message: Message) -> bytes:
    """Return the datagram for a message."""
    return json.dumps({"version": VERSION, "kind": type(message).__name__, **asdict(message)}).encode()


def decode(datagram: bytes) -> Message:
    """Return the message in a datagram.

    Raises: UnknownKind for a kind that we do not know, ValueError for anything else that `encode` does not make.
    """
    try:
        values = json.loads(datagram)
    except RecursionError:
        raise ValueError("a message that is nested too deep") from None
    if not isinstance(values, dict) or _plain(int, values.pop("version", None)) != VERSION:
        raise ValueError(f"not a message of version {VERSION}: {datagram[:80]!r}")
    kind = _KINDS.get(str(values.pop("kind", "")))
    if kind is None:
        raise UnknownKind(f"not a known message: {datagram[:80]!r}")
    return _plain(kind, values)  # type: ignore[no-any-return]  # `_KINDS` holds ours


def _plain(wanted: Any, value: Any) -> Any:
    """Return what JSON made as the type `wanted`. Raises: ValueError where it is of another one."""
    if wanted is Any:
        return value
    inner = get_args(wanted)
    if get_origin(wanted) is list and type(value) is list:
        return [_plain(inner[0], each) for each in value]
    if get_origin(wanted) is dict and type(value) is dict:
        return {name: _plain(inner[1], each) for name, each in value.items()}
    if wanted in _RECORDS and type(value) is dict:
        types = _types_of(wanted)
        known = {name: _plain(types[name], each) for name, each in value.items() if name in types}
        with suppress(TypeError):  # one is missing that has no default
            return wanted(**known)
    elif type(value) is wanted:
        return value
    raise ValueError(f"{str(value)[:80]!r} where a message has {wanted}")


@cache  # 0.3 ms a kind, which a worker that starts would feel if it were done for all of them at once
def _types_of(record: type[Any]) -> dict[str, Any]:
    return get_type_hints(record)
