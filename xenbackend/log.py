"""The service's log: configured once, with one logger per component.

Must not be imported by a worker: structlog costs 60 ms and 10 MiB, and workers log by messages to the supervisor.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from functools import partial
from typing import Any, TextIO

import structlog

from xenbackend import errors
from xenbackend.units import format_time

FORMATS = ("console", "journal", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # sd-daemon(3)
_TEXT_MAX = 500  # characters of one value

Logger = structlog.typing.FilteringBoundLogger


def configure(form: str = "console", level: str = "info", stream: TextIO | None = None) -> None:
    """Set how all loggers write: `form` is one of FORMATS, `level` one of LEVELS, `stream` is stderr by default."""
    processors: list[structlog.typing.Processor] = [_clean, structlog.processors.format_exc_info]
    if form == "json":
        processors += [structlog.processors.add_log_level, _stamp]
        processors.append(structlog.processors.JSONRenderer(ensure_ascii=False))
    elif form == "journal":
        processors.append(_render_for_journal)
    else:
        processors += [structlog.processors.add_log_level, _stamp]
        processors.append(structlog.dev.ConsoleRenderer(colors=(stream or sys.stderr).isatty()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=partial(_Writer, stream or sys.stderr),
        cache_logger_on_first_use=False,
    )


class _Writer:
    """Writes lines. Each method returns the number of bytes written, which the logger passes to its caller."""

    def __init__(self, stream: TextIO, *_: Any) -> None:
        self._stream = stream

    def msg(self, line: str) -> int:
        self._stream.write(f"{line}\n")
        self._stream.flush()
        return len(line.encode(self._stream.encoding or "utf-8", self._stream.errors or "replace")) + 1

    debug = info = warning = error = critical = msg


def get_logger(component: str, **fields: str) -> Logger:
    """Return a logger whose lines name their component and `fields`, such as ``vbd="vbd/1/51712"``.

    Its methods return the number of bytes written, None if the line is below the log level.
    """
    logger: Logger = structlog.get_logger(component=component, **fields)
    return logger


def printable(text: str) -> str:
    """Return a text with non-printable characters escaped, cut to _TEXT_MAX characters after escaping."""
    shown = errors.printable(text[: _TEXT_MAX + 1])
    return shown if len(shown) <= _TEXT_MAX else shown[:_TEXT_MAX] + "…"


def _clean(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make every value safe to print: some contain text that a guest wrote."""
    for key, value in fields.items():
        if isinstance(value, str):
            fields[key] = printable(value)
    return fields


def _stamp(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Say when it was; the journal does so itself."""
    fields["timestamp"] = format_time(time.time(), "milliseconds")
    return fields


def _render_for_journal(_: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    """Return a line in the form that systemd's journal reads from stderr: ``<6>vbd/1/51712: connected worker=4711``."""
    component, event = fields.pop("component", ""), fields.pop("event", "")
    prefix = f"<{_PRIORITIES.get(method, 6)}>"
    who = fields.pop("vbd", component)
    trace = fields.pop("exception", "")
    pairs = "".join(f" {key}={value!r}" if " " in str(value) else f" {key}={value}" for key, value in fields.items())
    lines = [f"{who}: {event}{pairs}", *str(trace).splitlines()]
    return "\n".join(prefix + line for line in lines)
