"""`xenbackend status`: what the service serves, and how fast.

Must not work anything out that a script would want: `--json` prints what the service says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from xenbackend.cli.arguments import duration
from xenbackend.errors import printable
from xenbackend.protocol.client import DEFAULT_SOCKET, call
from xenbackend.supervisor.service.status import rates
from xenbackend.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.table import Table

_SAMPLE_S = 1.0  # between the two pictures that rates are made of
_SHORTEST_S = 0.1  # between two looks of --watch
Picture = dict[str, dict[str, Any]]  # a description per vbd


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("status", help="show the disks that are served")
    parser.add_argument("--json", action="store_true", help="print all that is known, for scripts")
    parser.add_argument(
        "--watch", type=duration, nargs="?", const=2.0, metavar="SECONDS", help="go on, every SECONDS (%(const)s)"
    )
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="the service's socket (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print once, or go on until interrupted."""
    try:
        if args.json:
            _print_json(args)
        else:
            _print_tables(args)
    except KeyboardInterrupt:
        if args.watch is None:
            raise
    return 0


def _print_json(args: argparse.Namespace) -> None:
    print(json.dumps(call(args.socket, {"verb": "status"})["data"]))
    while args.watch is not None:
        sys.stdout.flush()
        time.sleep(max(args.watch, _SHORTEST_S))
        print(json.dumps(call(args.socket, {"verb": "status"})["data"]))


def _print_tables(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    before, started = _look(args.socket), time.monotonic()
    if args.watch is None:
        if before:
            time.sleep(_SAMPLE_S)
        console.print(_table(before, _look(args.socket), time.monotonic() - started))
        return
    with Live(_table(before, before, 0), console=console) as live:
        while True:
            time.sleep(max(args.watch, _SHORTEST_S))
            after, now = _look(args.socket), time.monotonic()
            live.update(_table(before, after, now - started))
            before, started = after, now


def _look(socket: str) -> Picture:
    return {each["vbd"]: each for each in call(socket, {"verb": "status"})["data"]}


def _table(before: Picture, after: Picture, seconds: float) -> Table | str:
    """Return the table, made so that it fits into 80 columns: what belongs together stands one above the other."""
    from rich.table import Table
    from rich.text import Text

    if not after:
        return "no disk is served"
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("disk\nstate", "worker", "reads", "writes", "median\n99%", "errors"):
        table.add_column(heading, no_wrap=True)
    table.add_column("chain", overflow="fold", ratio=1)
    for vbd, now in after.items():
        speed = rates(before.get(vbd, now), now, seconds)
        counted, latency = now["counters"], now["latency_ns"]
        cells = [
            f"{now['domid']}/{now['device']}\n{now['state']}",
            str(now["worker"] or "-"),
            f"{speed['reads']:.0f}/s\n{format_size(int(speed['read_bytes']))}/s",
            f"{speed['writes']:.0f}/s\n{format_size(int(speed['written_bytes']))}/s",
            f"{format_duration(latency.get('50%', 0) / 1e9)}\n{format_duration(latency.get('99%', 0) / 1e9)}",
            str(counted.get("errors", 0) + counted.get("guest_errors", 0)),
            printable(now["chain"]) + (" (read-only)" if now["read_only"] else ""),
        ]
        if now["error"]:
            cells[-1] += f"\n{printable(now['error'])}"
        table.add_row(*(Text(cell) for cell in cells))  # Text: a chain may hold what rich takes for mark-up
    return table
