"""`xenbackend metrics`: figures for a monitor, printed, written to a directory, or served by HTTP.

Must not import an HTTP server unless it is wanted: a timer runs this every few seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from xenbackend.cli import metrics_text
from xenbackend.cli.arguments import add_json, add_socket
from xenbackend.cli.metrics_text import Family
from xenbackend.cli.output import print_json
from xenbackend.client import Client, ServiceError
from xenbackend.errors import unwritable

FILE = "xenbackend.prom"  # the collector of node_exporter reads *.prom
_LOCAL = ("127.0.0.1", "::1", "localhost")


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "metrics",
        help="print figures of all disks for Prometheus",
        description="Print the figures of all disks, in the text format of Prometheus. docs/monitoring.md has "
        "alert rules and a dashboard for them.",
    )
    parser.add_argument("--openmetrics", action="store_true", help="in the format of OpenMetrics 1.0")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--textfile", type=Path, metavar="DIR", help=f"leave them in DIR/{FILE}, for the collector of node_exporter"
    )
    where.add_argument(
        "--listen",
        type=_address,
        metavar="ADDRESS:PORT",
        help="serve them by HTTP until interrupted, to this host only",
    )
    add_json(parser)
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print, write or serve figures. Raises: ServiceError; XenbackendError, if a place cannot be written or bound."""
    if args.listen is not None:
        from xenbackend.cli.metrics_http import serve  # late: it needs http.server

        serve(args.listen, partial(look, args.socket))
    elif args.textfile is not None:
        try:
            families = look(args.socket)
        except ServiceError:
            leave(args.textfile, metrics_text.text(metrics_text.of_nobody(), is_openmetrics=args.openmetrics))
            raise
        leave(args.textfile, metrics_text.text(families, is_openmetrics=args.openmetrics))
    elif args.json:
        print_json({"metrics": [_values(each) for each in look(args.socket)]})
    else:
        sys.stdout.write(metrics_text.text(look(args.socket), is_openmetrics=args.openmetrics))
    return 0


def look(control: str) -> list[Family]:
    """Ask the service for its figures. Raises: ServiceError."""
    client = Client(control)
    return metrics_text.of_service(client.service(), client.disks())


def leave(directory: Path, text: str) -> None:
    """Replace the file in a directory atomically, so that nobody reads half of it. Raises: XenbackendError."""
    import tempfile  # late: slow to import, and most calls write no file

    try:
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=f".{FILE}-", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # for the collector, which is another user
                Path(file.name).replace(directory / FILE)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as error:
        raise unwritable(f"{directory / FILE} cannot be written: {error.strerror}", error) from None


def _values(family: Family) -> dict[str, Any]:
    samples = [
        {"name": f"{family.name}{suffix}", "labels": labels, "value": value + 0}  # `+ 0` makes a number of a boolean
        for suffix, labels, value in family.samples
    ]
    return {"name": family.name, "type": family.kind, "help": family.help, "samples": samples}


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if host not in _LOCAL:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ADDRESS:PORT of this host, such as 127.0.0.1:9917; for other hosts put a proxy in front "
            "that authenticates them"
        )
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{port!r} is not a port")
    return host, int(port)
