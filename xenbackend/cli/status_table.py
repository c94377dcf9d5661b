"""`xenbackend status` on a terminal: a table, and with --watch one that goes on.

Must not work anything out: `status` does.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from xenbackend.cli import status
from xenbackend.cli.status import Known, Picture, Speed
from xenbackend.errors import printable
from xenbackend.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_STYLES = {"Connected": "green", "paused": "yellow"}  # of a disk's state
_OTHER_LINES = 3  # of a picture: headings, and what is said of the service
_LINES = 2  # that a disk takes at least


def show(args: argparse.Namespace) -> None:
    """Print once, or go on."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    before = status.look(args)
    if args.watch is None:
        if before.disks:
            time.sleep(status.SAMPLE_S)
        after = status.look(args) if before.disks else before
        console.print(table(args, before, after))
        console.print(Text(status.service_line(after)))
        return

    def frame(before: Picture, after: Picture) -> Group:
        room = max(1, (console.height - _OTHER_LINES) // _LINES)
        first = "" if before is not after else "; rates follow with the next picture"
        below = f"; {len(after.disks) - room} more do not fit: --sort" if len(after.disks) > room else ""
        return Group(table(args, before, after, room), Text(status.service_line(after) + first + below))

    with Live(frame(before, before), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(args.watch)
            after = status.look(args)
            live.update(frame(before, after), refresh=True)
            before = after


def table(args: argparse.Namespace, before: Picture, after: Picture, room: int | None = None) -> Table | Text:
    """Return the table of at most `room` disks; it fits into 80 columns: what belongs together is one cell."""
    from rich.table import Table
    from rich.text import Text

    if not after.disks:
        return Text("no disk is served")
    made = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("disk\nguest", "state\nworker", "reads", "writes", "mean\n99%", "errors"):
        made.add_column(heading, no_wrap=True)
    made.add_column("chain", overflow="fold", ratio=1)
    now = time.time()
    for known, moved in status.arranged(args, before, after)[:room]:
        made.add_row(*_cells(known, moved, now))
    return made


def _cells(known: Known, moved: Speed, now: float) -> list[Text]:
    from rich.text import Text  # Text: a chain may hold what rich takes for mark-up

    word = status.condition(known)
    worker = f"{known['worker']}, {status.age(known['worker_since'], now)}" if known["worker"] else "no worker"
    chain = printable(known["chain"]) + (" (read-only)" if known["read_only"] else "")
    notes = [*status.remarks(known), *([f"restarts: {known['restarts']}"] if known["restarts"] else [])]
    if known["needs_upgrade"]:
        notes.append(f"worker of {known['worker_version'] or 'another version'}: xenbackend upgrade {known['vbd']}")
    return [
        Text(f"{known['vbd']}\n{printable(known['guest'])}"),
        Text.assemble((word, _STYLES.get(word, "red" if known["reason"] else "")), f"\n{worker}"),
        Text(_rates(moved, "reads", "read_bytes")),
        Text(_rates(moved, "writes", "written_bytes")),
        Text(f"{_duration(moved.mean_ns)}\n{_duration(moved.p99_ns, '<')}"),
        Text(str(status.errors(known))),
        Text("\n".join([chain, *notes])),
    ]


def _rates(moved: Speed, requests: str, size: str) -> str:
    if moved.rates is None:
        return "-\n-"
    return f"{moved.rates[requests]:.0f}/s\n{format_size(int(moved.rates[size]))}/s"


def _duration(nanoseconds: float | None, before: str = "") -> str:
    return "-" if nanoseconds is None else before + format_duration(nanoseconds / 1e9)
