"""`xenbackend status`: what the service serves, and how fast.

Must not import rich without a terminal, nor compute anything: `pictures` does.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from xenbackend.cli import pictures
from xenbackend.cli.arguments import add_json, add_socket
from xenbackend.cli.columns import lines
from xenbackend.cli.output import print_json
from xenbackend.cli.pictures import Speed
from xenbackend.client import Disk
from xenbackend.errors import printable

COLUMNS = (
    "disk", "guest", "state", "worker", "age", "version", "restarts", "r/s", "w/s", "rB/s", "wB/s", "mean-us", "p99-us",
    "errors", "chain",
)  # fmt: skip


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "status",
        help="show the disks that are served",
        description="Show each disk: its state, its worker, requests and bytes per second, latency (mean, and the "
        "bound below which 99 of 100 requests lie), errors and chain. Rates and latency are those of one second, or "
        "with --watch of the time since the last refresh. On a terminal it is a table, otherwise a line for each disk.",
    )
    parser.add_argument("vbds", nargs="*", metavar="DISK", help="only these disks, such as 5/xvda or guest/xvda")
    parser.add_argument(
        "--watch",
        type=pictures.interval,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="refresh every SECONDS (%(const)s)",
    )
    parser.add_argument("--sort", choices=pictures.SORTS, default="disk", help="what to sort by (%(default)s)")
    add_json(parser, "print all that is known, as JSON; docs/json.md has its keys")
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print once, or go on until interrupted."""
    try:
        if args.json:
            _print_json(args)
        elif sys.stdout.isatty():
            from xenbackend.cli.status_table import show  # late: it needs rich

            show(args)
        else:
            _print_lines(args)
    except KeyboardInterrupt:
        if args.watch is None:
            raise
    return 0


def line(known: Disk, moved: Speed, now: float) -> list[str]:
    """Return one disk as the words of COLUMNS, with a dash for what is not known; remarks follow the chain."""
    rates = [f"{moved.rates[each]:.0f}" if moved.rates else "-" for each in pictures.RATES]
    latencies = ["-" if each is None else f"{each / 1e3:.0f}" for each in (moved.mean_ns, moved.p99_ns)]
    worker = [str(known.worker or "-"), pictures.age(known.worker_since, now), known.worker_version or "-"]
    chain = printable(known.chain) or "-"
    words = [known.vbd, printable(known.guest) or "-", pictures.condition(known), *worker, str(known.restarts)]
    return [
        *words,
        *rates,
        *latencies,
        str(pictures.errors(known)),
        chain + "".join(f"  # {each}" for each in pictures.remarks(known)),
    ]


def _print_json(args: argparse.Namespace) -> None:
    while True:
        picture = pictures.look(args)
        rows = pictures.arranged(args, picture, picture)
        print_json({"service": picture.service.values, "vbds": [known.values for known, _ in rows]})
        sys.stdout.flush()
        if args.watch is None:
            return
        time.sleep(args.watch)


def _print_lines(args: argparse.Namespace) -> None:
    """Print a line for each disk, below a line of headings; with --watch a block of them at every look."""
    before = after = pictures.look(args)
    if args.watch is None and before.disks:
        time.sleep(pictures.SAMPLE_S)
        after = pictures.look(args)
    while True:
        now = time.time()
        rows = [list(COLUMNS), *(line(*row, now) for row in pictures.arranged(args, before, after))]
        print("\n".join(lines(rows)))
        sys.stdout.flush()
        if args.watch is None:
            return
        time.sleep(args.watch)
        before, after = after, pictures.look(args)
