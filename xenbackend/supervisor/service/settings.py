"""The service's settings: a TOML file, all of it optional, and what the command line overrides.

Must not act on a setting.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from xenbackend import settings_file
from xenbackend.blkif.features import MAX_QUEUES, MAX_SEGMENTS, Limits
from xenbackend.block.policy import DEFAULT, Policy
from xenbackend.errors import ConfigError
from xenbackend.log import FORMATS, LEVELS
from xenbackend.protocol.client import DEFAULT_SOCKET
from xenbackend.settings_file import PATH, SCRATCH
from xenbackend.walls.raising import MODES

_SERVE = ("ours", "all")
_POLL_US_MAX = 1000  # beyond this, looking costs more than sleeping and being woken
_TYPES = {"str": (str, "text in quotes"), "int": (int, "a whole number"), "list[str]": (list, "a list of texts")}
_LIMIT_RANGES = {"max_queues": (1, MAX_QUEUES), "max_ring_order": (0, 4), "max_segments": (11, MAX_SEGMENTS)}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its default; the names are the keys of the file."""

    store: str = ""  # xenstore's socket or device; empty: found as xenstore's own tools do
    host: str = "xenbackend.kernel.xen"  # for `kernel.ports.open_host`
    socket: str = DEFAULT_SOCKET
    group: str = ""  # its members may ask what changes nothing, such as `xenbackend status`; empty: root alone may
    serve: str = "ours"  # "ours": vbds whose script is named in `scripts`; "all": every vbd
    scripts: list[str] = field(default_factory=lambda: ["block-xenbackend", "tap2"])  # base names
    kinds: list[str] = field(default_factory=lambda: ["vbd", "vbd3"])
    poll_us: int = 60  # how long a worker looks for the next request before it sleeps; 0: not at all
    on_error: str = DEFAULT  # what becomes of requests that the disk cannot do, see `xenbackend policy`
    walls: str = "on"  # whether workers raise walls: "on", "off"; "require": no disk is served if one is missing
    log: str = "console"
    log_level: str = "info"
    parents: list[str] = field(default_factory=list)  # directories below which any image's parents may be
    scratch: str = SCRATCH  # directory for the unnamed files of cow:
    limits: Limits = field(default_factory=Limits)  # a table of its own: [limits]


class SettingsError(ConfigError):
    """Settings that cannot be used. `mistakes` are sentences, each with its place; the first one is the text."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        more = (
            f"; and {len(mistakes) - 1} more mistakes, which `xenbackend run --check` shows"
            if len(mistakes) > 1
            else ""
        )
        super().__init__(f"{mistakes[0]}{more}")
        self.mistakes = list(mistakes)


@dataclass(frozen=True, slots=True)
class _Mistake:
    """What is wrong with a setting; its name is as in `settings_file.lines`."""

    name: str
    sentence: str


def load(path: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """Return the settings of a file, with `overrides` (None: not given) on top.

    Args:
        path: the file, which must exist; None for `PATH`, which need not.
        overrides: values by setting, as the command line gave them.

    Raises: ConfigError, naming the file; SettingsError, naming line and setting too.
    """
    values = settings_file.read(path or PATH, must_exist=path is not None)
    given = {name: value for name, value in overrides.items() if value is not None}
    lines = {name: line for name, line in settings_file.lines(path or PATH).items() if name not in given}
    return make(values | given, str(path or PATH), lines)


def make(values: dict[str, Any], where: str, lines: Mapping[str, int] | None = None) -> Settings:
    """Return settings from plain values by name. Raises: SettingsError.

    Args:
        values: by setting; the table of limits is taken out of it.
        where: where the values come from, for people.
        lines: the line of each setting that is in a file.
    """
    limits = values.pop("limits", {})
    if not isinstance(limits, dict):
        limits, mistakes = {}, [_Mistake("limits", "limits is not a table; write [limits] and its settings below it")]
    else:
        mistakes = [*_wrong_types(Limits, limits, "limits.")]
    mistakes += _wrong_types(Settings, values, but=("limits",))
    wrong = {each.name for each in mistakes}
    right = {name: value for name, value in values.items() if name not in wrong}
    bounded = {name: value for name, value in limits.items() if f"limits.{name}" not in wrong}
    settings = replace(Settings(**right), limits=replace(Limits(), **bounded))
    mistakes += [*_wrong_values(settings), *_wrong_limits(settings.limits)]
    if mistakes:
        raise SettingsError(_told(mistakes, where, lines or {}))
    return settings


def _told(mistakes: Sequence[_Mistake], where: str, lines: Mapping[str, int]) -> list[str]:
    """Return the sentences in the order of the file; those about the command line come last."""
    placed = sorted(mistakes, key=lambda each: lines.get(each.name, sys.maxsize))
    return [f"{where}{f':{lines[each.name]}' if each.name in lines else ''}: {each.sentence}" for each in placed]


def _wrong_types(
    kind: type[Any], values: Mapping[str, Any], table: str = "", but: tuple[str, ...] = ()
) -> Iterator[_Mistake]:
    known = {each.name: str(each.type) for each in fields(kind) if each.name not in but}
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the known ones are {', '.join(known)}"
            yield _Mistake(table + name, f"there is no setting {table}{name}; {hint}")
            continue
        wanted, words = _TYPES[known[name]]
        is_right = isinstance(value, wanted) and not isinstance(value, bool)
        if wanted is list:
            is_right = is_right and all(isinstance(each, str) for each in value)
        if not is_right:
            yield _Mistake(table + name, f"{table}{name} is {value!r}; it must be {words}")


def _wrong_values(settings: Settings) -> Iterator[_Mistake]:
    for name in ("host", "socket"):
        if not getattr(settings, name):
            yield _Mistake(name, f"{name} is empty; leave it out to use the default")
    if not settings.kinds or not all(each.isalnum() for each in settings.kinds):
        yield _Mistake("kinds", f"kinds is {settings.kinds}; it must name directories of xenstore, such as vbd")
    if not 0 <= settings.poll_us <= _POLL_US_MAX:
        yield _Mistake("poll_us", f"poll_us is {settings.poll_us}; it must be from 0 to {_POLL_US_MAX}")
    try:
        Policy(settings.on_error)
    except ConfigError as error:
        yield _Mistake("on_error", f"on_error: {error}")
    for name, choices in (("serve", _SERVE), ("walls", MODES), ("log", FORMATS), ("log_level", LEVELS)):
        if getattr(settings, name) not in choices:
            yield _Mistake(name, f"{name} is {getattr(settings, name)!r}; it must be {' or '.join(choices)}")
    if not settings.scratch.startswith("/"):
        yield _Mistake("scratch", f"scratch is {settings.scratch!r}; it must name a directory by its whole path")
    if not all(each.startswith("/") for each in settings.parents):
        yield _Mistake("parents", f"parents is {settings.parents}; it must name directories by their whole paths")


def _wrong_limits(limits: Limits) -> Iterator[_Mistake]:
    for name, (least, most) in _LIMIT_RANGES.items():
        value = getattr(limits, name)
        if not least <= value <= most:
            yield _Mistake(f"limits.{name}", f"limits.{name} is {value}; it must be from {least} to {most}")
