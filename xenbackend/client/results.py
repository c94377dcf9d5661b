"""A service's answers, typed: each field has the name of its key in docs/json.md, with `_` if that is a keyword.

Must not ask anybody. If a service of an older release leaves keys out, the fields have the values that were true then;
keys that a newer release adds are in `values`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar

from xenbackend.counters import BUCKETS
from xenbackend.disks import DiskName
from xenbackend.protocol import plain
from xenbackend.protocol.codes import Code, known

Values = dict[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What a service that is stopping waits for: `for_`, at the disk `vbd`."""

    vbd: str
    for_: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The service; `version` is empty for one of release 0.1.0."""

    pid: int
    version: str
    since: float | None
    waits: tuple[Wait, ...]
    bugs: int
    breaches: int
    host: str
    store: str
    store_error: str
    values: Values = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of a chain; the sizes are 0 if only its text is known."""

    layer: str
    size: int = 0
    sector_size: int = 0
    physical_sector_size: int = 0
    read_only: bool = False
    can_flush: bool = False
    can_discard: bool = False
    discard_granularity: int = 0
    discard_alignment: int = 0
    parent_of: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    figures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a disk, and what its name means by now."""

    file: str
    now: str
    difference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """An order that is under way."""

    order: int
    verb: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long a sample of the requests of one operation took; element n of `buckets` counts those below 2^n ns."""

    sum_ns: int
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk in service."""

    vbd: str
    node: str
    kind: str
    domid: int
    device: str
    guest: str
    chain: str
    read_only: bool | None
    layers: tuple[Layer, ...]
    state: str
    frontend_state: str
    phase: str
    since: float
    braked_s: float
    paused: bool
    paused_by: str
    reason: str
    error: str
    waits_s: float | None
    waits_for: str
    under_way: tuple[Pending, ...]
    worker: int | None
    worker_since: float | None
    worker_version: str
    needs_upgrade: bool
    walls: tuple[str, ...]
    no_walls: dict[str, str]
    needs: tuple[str, ...]
    restarts: int
    files: tuple[File, ...]
    counters: dict[str, int]
    latency_histogram: tuple[int, ...]
    latency_by_operation: dict[str, Latency]
    values: Values = field(repr=False)

    def is_called(self, name: DiskName) -> bool:
        """Return whether this name means this disk."""
        return name.means(self.kind, self.domid, self.devid, self.guest)

    @property
    def devid(self) -> int:
        """The number of its device. Raises: ValueError, if `node` is not a node of xenstore."""
        return int(self.node.rpartition("/")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Who:
    """The process that has given an order, as it was then."""

    uid: int | None = None
    pid: int | None = None
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order in the service's ledger; while it is under way, `ended` is None and `code` is `Code.UNDER_WAY`.

    token   the client's own name for it, or empty
    """

    number: int
    verb: str
    vbd: str
    who: Who
    from_: str
    to: str
    began: float
    ended: float | None
    code: Code
    error: str
    token: str
    values: Values = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """An order that was done. `order` is its number: None if it only reads, and from release 0.1.0."""

    order: int | None
    values: Values = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(Done):
    """An order that may change the chain; `chain` is the one in service afterwards."""

    chain: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Changed):
    """What an exchange would do: the layers `before` and `after` it. `chain` is the one in service, unchanged."""

    before: tuple[Layer, ...]
    after: tuple[Layer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Done):
    """The policy in force for requests that fail."""

    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgraded(Done):
    """The process that serves the disk from now on: None if no new one was needed, and from release 0.1.0."""

    worker: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long requests of one operation took in a layer; `buckets` counts those below 2^n ns, by n."""

    bytes: int
    sum_ns: int
    buckets: dict[str, int]

    @property
    def histogram(self) -> tuple[int, ...]:
        """The buckets in the form of `Disk.latency_histogram`: element n counts requests below 2^n ns."""
        return tuple(self.buckets.get(str(place), 0) for place in range(BUCKETS))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """What a layer did while it was timed, by operation; its times include those of the layers below it."""

    layer: str
    operations: dict[str, Times]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Done):
    """How long each layer of a chain took, top first."""

    chain: str
    seconds: float
    layers: tuple[LayerTimes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Untold:
    """A disk whose chain in service could not be written to xenstore."""

    vbd: str
    chain: str
    next_chain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Done):
    """The service that has ended, and the chains that only a file tells the next service."""

    pid: int
    untold: tuple[Untold, ...]


def service(said: Any) -> Service:
    """Return what a service reports about itself. Raises: ValueError, as all of these, if no service says that."""
    return _read(Service, _map(said))


def disk(said: Any) -> Disk:
    """Return what a service reports about a disk."""
    return _read(Disk, _map(said))


def order(said: Any) -> Order:
    """Return an order as a service's ledger has it."""
    return _read(Order, _map(said))


def each_of(read: Callable[[Any], _T], said: Any) -> list[_T]:
    """Read each value of a list."""
    return [read(each) for each in _list(said)]


def done(cls: type[_T], number: int | None, data: Any, **defaults: object) -> _T:
    """Return the answer to an order as `Done` or a subclass; `defaults` are for keys that an older service leaves out.

    Release 0.1.0 answered `policy` with a text.
    """
    said = {"policy": data} if cls is Policy and isinstance(data, str) else plain.answered(data)
    return _read(cls, {**defaults, **said, "order": number}, values=said)


def _read(cls: type[_T], said: Values, values: Values | None = None) -> _T:
    """Return a typed value; each field is checked against its type. Raises: ValueError."""
    found: Values = {}
    for each in fields(cls):  # type: ignore[arg-type]  # all of them are dataclasses
        key = each.name.rstrip("_")
        if key == "values":
            found[key] = said if values is None else values
        elif key in said:
            found[each.name] = _KINDS[str(each.type)](said[key])
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"there is no {key}")
    return cls(**found)


def _map(said: Any) -> Values:
    if not isinstance(said, dict):
        raise ValueError(f"not a map: {str(said)[:40]}")
    return said


def _list(said: Any) -> list[Any]:
    if not isinstance(said, list):
        raise ValueError(f"not a list: {str(said)[:40]}")
    return said


def _one(*kinds: type) -> Callable[[Any], Any]:
    """Return a function that takes values of these types only, as they are; a boolean is no number."""

    def take(said: Any) -> Any:
        if not isinstance(said, kinds) or (isinstance(said, bool) and bool not in kinds):
            raise ValueError(f"not {kinds[0].__name__}: {str(said)[:40]}")
        return said

    return take


def _each(take: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that takes a list of such values."""
    return lambda said: tuple(map(take, _list(said)))


def _named(take: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that takes a map of texts to such values."""
    return lambda said: {str(key): take(value) for key, value in _map(said).items()}


def _of(cls: type[_T]) -> Callable[[Any], _T]:
    return lambda said: _read(cls, _map(said))


_text, _number, _real = _one(str), _one(int), _one(int, float)
_KINDS: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "int": _number,
    "float": _real,
    "bool": _one(bool),
    "int | None": _one(int, NoneType),
    "float | None": _one(int, float, NoneType),
    "bool | None": _one(bool, NoneType),
    "Code": known,
    "Who": _of(Who),
    "dict[str, str]": _named(_text),
    "dict[str, int]": _named(_number),
    "dict[str, Latency]": _named(_of(Latency)),
    "dict[str, Times]": _named(_of(Times)),
    "tuple[str, ...]": _each(_text),
    "tuple[int, ...]": _each(_number),
    "tuple[Layer, ...]": _each(lambda said: _read(Layer, plain.layer(said))),
    "tuple[LayerTimes, ...]": _each(_of(LayerTimes)),
    "tuple[File, ...]": _each(_of(File)),
    "tuple[Pending, ...]": _each(_of(Pending)),
    "tuple[Wait, ...]": _each(_of(Wait)),
    "tuple[Untold, ...]": _each(_of(Untold)),
}
