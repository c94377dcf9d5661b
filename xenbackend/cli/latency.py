"""`xenbackend latency DISK`: how long a disk's requests take, as a histogram of an interval.

Must not give an order (`latency_layers` does), nor draw: `latency_text` and `latency_plot` do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from xenbackend.cli import pictures
from xenbackend.cli.arguments import add_json, add_socket
from xenbackend.cli.histogram import Histogram, difference
from xenbackend.cli.output import print_json
from xenbackend.client import Client, Disk
from xenbackend.errors import ConfigError


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "latency",
        help="show how long a disk's requests take",
        description="Show how long the requests of one interval took, from when they were taken from the guest's ring "
        "to the answer: a histogram whose buckets are powers of two, of the first request of about every eighth batch. "
        "With --layers the worker times each layer of the chain meanwhile, which costs it less than half a "
        "microsecond for each request and layer, and then goes on as before; Ctrl-C ends that, too.",
    )
    parser.add_argument("vbd", metavar="DISK", help="such as 5/xvda or guest/xvda")
    parser.add_argument(
        "--interval", type=pictures.interval, default=5.0, metavar="SECONDS", help="how long to look (%(default)s)"
    )
    parser.add_argument("--total", action="store_true", help="of all requests since the disk was attached instead")
    parser.add_argument(
        "--layers", action="store_true", help="of each layer and operation, of all requests; only root may order it"
    )
    parser.add_argument(
        "--end",
        action="store_true",
        help="with --layers: end the measurement that is under way; the command that began it prints its times so far",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a picture, too; needs xenbackend[plot]")
    add_json(parser)
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, print and draw. Raises: ServiceError; ConfigError, if the picture fails."""
    if args.end and not args.layers:
        raise ConfigError("--end ends what --layers has begun: give both")
    if args.layers:
        from xenbackend.cli import latency_layers

        if args.total or args.plot is not None:
            raise ConfigError("--layers measures from now on, and draws nothing: leave out --total and --plot")
        return latency_layers.run(args)
    if args.plot is not None:
        from xenbackend.bench.plot import check  # late: only for pictures

        check()
    known, histogram = look(args)
    if args.json:
        print_json(values(known, histogram))
    else:
        from xenbackend.cli.latency_text import lines

        print("\n".join(lines(known, histogram)))
    if args.plot is not None:
        from xenbackend.cli.latency_plot import save

        save(known, histogram, args.plot)
    return 0


def look(args: argparse.Namespace) -> tuple[Disk, Histogram]:
    """Return the disk as it is at the end of the interval, and its latencies."""
    client = Client(args.socket)
    before = client.disk(args.vbd)
    if args.total:
        return before, Histogram(before.latency_histogram, before.counters["latency_ns"], None)
    begun = time.monotonic()
    time.sleep(args.interval)
    after = client.disk(args.vbd)
    return after, difference(before, after, time.monotonic() - begun)


def values(known: Disk, histogram: Histogram) -> dict[str, Any]:
    """Return the values for --json."""
    return {
        "vbd": known.vbd,
        "chain": known.chain,
        "seconds": None if histogram.seconds is None else round(histogram.seconds, 3),
        "samples": histogram.samples,
        **histogram.as_json(),
    }
