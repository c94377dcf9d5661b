"""`xenbackend status` on a terminal: a table, remarks about its disks below it, and a line about the service.

Must not compute anything: `status` does.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from xenbackend.cli import columns, pictures
from xenbackend.cli.pictures import Picture, Speed
from xenbackend.client import Disk
from xenbackend.errors import printable
from xenbackend.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

_STYLES = {"Connected": "green", "paused": "yellow"}  # of a disk's state
_LINES = 2  # that each disk takes at least


def show(args: argparse.Namespace) -> None:
    """Print once, or, with --watch, until interrupted."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    before = after = pictures.look(args)
    if args.watch is None:
        if before.disks:
            time.sleep(pictures.SAMPLE_S)
            after = pictures.look(args)
        console.print(frame(args, before, after))
        return
    with Live(fitting(console, args, before, before), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(args.watch)
            after = pictures.look(args)
            live.update(fitting(console, args, before, after), refresh=True)
            before = after


def fitting(console: Console, args: argparse.Namespace, before: Picture, after: Picture) -> Group:
    """Return as much of a picture as the terminal has lines for: lines beyond that could not be erased."""
    room = min(len(after.disks), console.height // _LINES)
    while True:
        found = frame(args, before, after, room)
        excess = len(console.render_lines(found)) - console.height
        if excess <= 0 or room <= 1:
            return found
        room = max(1, room - -(-excess // (2 * _LINES)))


def frame(args: argparse.Namespace, before: Picture, after: Picture, room: int | None = None) -> Group:
    """Return a picture with at most `room` disks; at the first picture of --watch, `before` is `after`."""
    from rich.console import Group
    from rich.text import Text

    rows = pictures.arranged(args, before, after)[:room]
    notes = [f"{known.vbd}: {each}" for known, _ in rows for each in _notes(known)]
    line = pictures.service_line(after)
    if before is after and rows:
        line += "; rates follow with the next refresh"
    if len(rows) < len(after.disks):
        line += f"; {len(after.disks) - len(rows)} more disks do not fit here: see --sort"
    return Group(*([table(rows)] if rows else []), *map(Text, [*notes, line]))


def table(rows: list[tuple[Disk, Speed]]) -> Table:
    """Return the table, which fits into 80 columns: related values are stacked in one cell."""
    made = columns.table(("disk\nguest", "state\nworker", "reads", "writes", "mean\n99%", "errors", "chain"))
    now = time.time()
    for known, moved in rows:
        made.add_row(*_cells(known, moved, now))
    return made


def _notes(known: Disk) -> list[str]:
    restarts = [f"restarts of its worker: {known.restarts}"] if known.restarts else []
    return [*pictures.remarks(known), *restarts]


def _cells(known: Disk, moved: Speed, now: float) -> list[Text]:
    from rich.text import Text  # a chain may hold what rich takes for mark-up

    word = pictures.condition(known)
    worker = f"{known.worker}, {pictures.age(known.worker_since, now)}" if known.worker else "no worker"
    return [
        Text(f"{known.vbd}\n{printable(known.guest)}"),
        Text.assemble((word, _STYLES.get(word, "red" if known.reason else "")), f"\n{worker}"),
        Text(_rates(moved, "reads", "read_bytes")),
        Text(_rates(moved, "writes", "written_bytes")),
        Text(f"{_duration(moved.mean_ns)}\n{_duration(moved.p99_ns, '<')}"),
        Text(str(pictures.errors(known))),
        Text(printable(known.chain) + (" (read-only)" if known.read_only else "")),
    ]


def _rates(moved: Speed, requests: str, size: str) -> str:
    if moved.rates is None:
        return "-\n-"
    return f"{moved.rates[requests]:.0f}/s\n{format_size(int(moved.rates[size]))}/s"


def _duration(nanoseconds: float | None, before: str = "") -> str:
    return "-" if nanoseconds is None else before + format_duration(nanoseconds / 1e9)
