"""The service's settings: a TOML file, all of it optional, and what the command line overrides.

Must not act on a setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from xenbackend import settings_file
from xenbackend.blkif.features import MAX_QUEUES, MAX_SEGMENTS, Limits
from xenbackend.block.policy import DEFAULT, Policy
from xenbackend.errors import ConfigError
from xenbackend.log import FORMATS, LEVELS
from xenbackend.protocol.client import DEFAULT_SOCKET
from xenbackend.settings_file import PATH
from xenbackend.walls.raising import MODES

_SERVE = ("ours", "all")
_POLL_US_MAX = 1000  # from there on to look is dearer than to sleep and be woken
_TYPES = {"str": (str, "text in quotes"), "int": (int, "a whole number"), "list[str]": (list, "a list of texts")}
_LIMIT_RANGES = {"max_queues": (1, MAX_QUEUES), "max_ring_order": (0, 4), "max_segments": (11, MAX_SEGMENTS)}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its default; the names are the keys of the file."""

    store: str = ""  # xenstore's socket or device; empty: found as xenstore's own tools do
    host: str = "xenbackend.kernel.xen"  # for `kernel.ports.open_host`
    socket: str = DEFAULT_SOCKET
    group: str = ""  # of users who may ask what changes nothing, such as `xenbackend status`; empty: root alone may
    serve: str = "ours"  # "ours": vbds whose script is named in `scripts`; "all": every vbd
    scripts: list[str] = field(default_factory=lambda: ["block-xenbackend", "tap2"])  # base names
    kinds: list[str] = field(default_factory=lambda: ["vbd", "vbd3"])
    poll_us: int = 60  # how long a worker looks for the next request before it sleeps; 0 is never
    on_error: str = DEFAULT  # what becomes of requests that the disk cannot do, see `xenbackend policy`
    walls: str = "on"  # what a worker gives up before it serves; "off", "require": without all of it nothing is served
    log: str = "console"
    log_level: str = "info"
    parents: list[str] = field(default_factory=list)  # directories below which parents may be, whatever names them
    limits: Limits = field(default_factory=Limits)  # a table of its own: [limits]


def load(path: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """Return the settings of a file, with `overrides` (None: not given) on top.

    Args:
        path: the file, which must exist; None for `PATH`, which need not.
        overrides: values by setting, as the command line gave them.

    Raises: ConfigError, naming file and setting.
    """
    values = settings_file.read(path or PATH, must_exist=path is not None)
    values |= {name: value for name, value in overrides.items() if value is not None}
    return make(values, str(path or PATH))


def make(values: dict[str, Any], where: str) -> Settings:
    """Return settings from plain values by name; `where` they stand, for people. Raises: ConfigError."""
    limits = values.pop("limits", {})
    _check_types(where, Settings, values, but=("limits",))
    if not isinstance(limits, dict):
        raise ConfigError(f"{where}: limits is not a table; write [limits] and its settings below it")
    _check_types(where, Limits, limits)
    settings = replace(Settings(**values), limits=replace(Limits(), **limits))
    _check_values(where, settings)
    if not all(each.startswith("/") for each in settings.parents):
        raise ConfigError(f"{where}: parents is {settings.parents}; it must name directories by their whole paths")
    return settings


def _check_types(where: str, kind: type[Any], values: Mapping[str, Any], but: tuple[str, ...] = ()) -> None:
    known = {each.name: str(each.type) for each in fields(kind) if each.name not in but}
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
            raise ConfigError(f"{where}: there is no setting {name}; {hint}")
        wanted, words = _TYPES[known[name]]
        is_right = isinstance(value, wanted) and not isinstance(value, bool)
        if wanted is list:
            is_right = is_right and all(isinstance(each, str) for each in value)
        if not is_right:
            raise ConfigError(f"{where}: {name} is {value!r}; it must be {words}")


def _check_values(where: str, settings: Settings) -> None:
    for name in ("host", "socket"):
        if not getattr(settings, name):
            raise ConfigError(f"{where}: {name} is empty; leave it away for the default")
    if not settings.kinds or not all(each.isalnum() for each in settings.kinds):
        raise ConfigError(f"{where}: kinds is {settings.kinds}; it must name directories of xenstore, such as vbd")
    if not 0 <= settings.poll_us <= _POLL_US_MAX:
        raise ConfigError(f"{where}: poll_us is {settings.poll_us}; it must be from 0 to {_POLL_US_MAX}")
    try:
        Policy(settings.on_error)
    except ConfigError as error:
        raise ConfigError(f"{where}: on_error: {error}") from None
    for name, choices in (("serve", _SERVE), ("walls", MODES), ("log", FORMATS), ("log_level", LEVELS)):
        if getattr(settings, name) not in choices:
            raise ConfigError(f"{where}: {name} is {getattr(settings, name)!r}; it must be {' or '.join(choices)}")
    for name, (least, most) in _LIMIT_RANGES.items():
        value = getattr(settings.limits, name)
        if not least <= value <= most:
            raise ConfigError(f"{where}: limits.{name} is {value}; it must be from {least} to {most}")
