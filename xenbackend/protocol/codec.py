"""Datagrams of `protocol.messages` and `protocol.opening`, and the plain values of their parts: strict both ways.

Must not open a socket, nor trust a datagram: what a worker sends is as hostile as what a guest writes.

A value has exactly the fields of its class, each of its own type; only fields with a default may be left out. Integers
fit into 64 bits. Text can be stored as UTF-8, or is a file name that Python holds with lone surrogates below U+DD00. No
list, dictionary or text is longer than its bound. If a field may hold one of several classes, ``kind`` says which.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from xenbackend.protocol.messages import MAX_MESSAGE, MOST, VERSION, FromSupervisor, FromWorker

MAX_ITEMS = 4096  # of a list or dictionary whose field says nothing else (`messages.MOST`)
MAX_TEXT = MAX_MESSAGE  # characters
_KIND = "kind"


class NotAMessage(ValueError):
    """A datagram that none of our processes sends."""


def encode(message: Any) -> bytes:
    """Return the datagram for a message: one of `messages`, or of `opening`."""
    return json.dumps({"version": VERSION, **as_fields(message), _KIND: type(message).__name__}).encode()


def from_worker(datagram: bytes) -> FromWorker:
    """Return a worker's message. Raises: NotAMessage, for anything that `encode` does not make of one."""
    return decode(FromWorker, datagram)  # type: ignore[no-any-return]  # it is of that union


def from_supervisor(datagram: bytes) -> FromSupervisor:
    """Return a supervisor's message. Raises: NotAMessage."""
    return decode(FromSupervisor, datagram)  # type: ignore[no-any-return]  # it is of that union


def as_fields(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain values for JSON; `restore` reverses this."""
    kind: Any = type(value)
    return {each.name: _as_plain(wanted, getattr(value, each.name)) for each, wanted in _fields_of(kind)}


def restore(kind: type[Any], values: Any) -> Any:
    """Return the dataclass of plain values from `as_fields`. Raises: NotAMessage, if they are not of that kind."""
    return _restore(kind, values)


def decode(kinds: Any, datagram: bytes) -> Any:
    """Return a message of one of several classes, joined by `|`. Raises: NotAMessage."""
    try:
        values = json.loads(datagram, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # also of deep nesting, and of bytes that are no UTF-8
        raise NotAMessage(f"not a message: {datagram[:80]!r}") from None
    version = values.pop("version", None) if isinstance(values, dict) else None
    if type(version) is not int or version != VERSION:
        raise NotAMessage(f"not a message of version {VERSION}: {datagram[:80]!r}")
    return _restore_one_of(kinds, values)


def prepare(*kinds: Any) -> None:
    """Look up the fields of all messages of these classes, joined by `|`, and of their parts.

    This happens at the first message of a kind anyhow; a process that forks does it once for all its children.
    """
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind):
            prepare(*(wanted for _, wanted in _fields_of(kind)))
        else:
            prepare(*get_args(kind))


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _as_plain(wanted: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(wanted, UnionType) and is_dataclass(value):
        kinds = [each for each in get_args(wanted) if each is not type(None)]
        return {**as_fields(value), _KIND: type(value).__name__} if len(kinds) > 1 else as_fields(value)
    if is_dataclass(value):
        return as_fields(value)
    if get_origin(wanted) is list:
        return [_as_plain(get_args(wanted)[0], each) for each in value]
    if get_origin(wanted) is dict:
        return {name: _as_plain(get_args(wanted)[1], each) for name, each in value.items()}
    return value


def _restore(wanted: Any, value: Any) -> Any:
    """Return a value from JSON as the type `wanted`. Raises: NotAMessage, if it is of another one."""
    if isinstance(wanted, UnionType):
        return _restore_one_of(wanted, value)
    if is_dataclass(wanted):
        return _restore_fields(wanted, value)
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        if isinstance(value, str) and value in wanted._value2member_map_:
            return wanted(value)
    elif get_origin(wanted) is list and type(value) is list and len(value) <= MAX_ITEMS:
        return [_restore(get_args(wanted)[0], each) for each in value]
    elif get_origin(wanted) is dict and type(value) is dict and len(value) <= MAX_ITEMS:
        return {_restore(str, name): _restore(get_args(wanted)[1], each) for name, each in value.items()}
    elif type(value) is wanted and is_storable(value):
        return value
    raise NotAMessage(f"{_shown(value)} where a message has {wanted}")


def _restore_one_of(kinds: Any, value: Any) -> Any:
    inner = [each for each in get_args(kinds) if each is not type(None)]
    if value is None and len(inner) < len(get_args(kinds)):
        return None
    if len(inner) == 1:
        return _restore(inner[0], value)
    named = {each.__name__: each for each in inner}
    if not isinstance(value, dict) or not isinstance(value.get(_KIND), str) or value[_KIND] not in named:
        raise NotAMessage(f"{_shown(value)} where a message has one of {', '.join(named)}")
    return _restore_fields(named[value[_KIND]], {name: each for name, each in value.items() if name != _KIND})


def _restore_fields(kind: Any, value: Any) -> Any:
    if type(value) is not dict:
        raise NotAMessage(f"{_shown(value)} where a message has {kind.__name__}")
    found, left = {}, dict(value)
    for each, wanted in _fields_of(kind):
        if each.name in left:
            inner = left.pop(each.name)
            if MOST in each.metadata and isinstance(inner, list | dict) and len(inner) > each.metadata[MOST]:
                raise NotAMessage(f"{kind.__name__} with {len(inner)} {each.name}, of at most {each.metadata[MOST]}")
            found[each.name] = _restore(wanted, inner)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise NotAMessage(f"{kind.__name__} without {each.name}")
    if left:
        raise NotAMessage(f"{kind.__name__} has no {str(next(iter(left)))[:80]!r}")
    return kind(**found)


def _shown(value: Any) -> str:
    """Return a value for people; nested ones are not written out, which would take the interpreter's stack."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)[:80]


def is_storable(value: Any) -> bool:
    """Return whether a plain value can be stored wherever it may go: in the journal, a log, xenstore."""
    if type(value) is int:
        return -(2**63) <= value < 2**64
    if type(value) is str:
        return len(value) <= MAX_TEXT and (
            value.isascii() or all(not "\ud800" <= each <= "\udfff" or "\udc80" <= each <= "\udcff" for each in value)
        )
    return True


@cache  # 0.3 ms for each kind: too much for a starting worker if done for all kinds at once; see `prepare`
def _fields_of(kind: Any) -> tuple[tuple[Any, Any], ...]:
    types = get_type_hints(kind)
    return tuple((each, types[each.name]) for each in fields(kind))
