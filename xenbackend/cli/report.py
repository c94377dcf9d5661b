"""`xenbackend report`: one archive for a report of a fault.

Must not send anything, nor gather anything itself.
"""

from __future__ import annotations

import argparse
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xenbackend import settings_file
from xenbackend.cli.arguments import add_json, add_socket
from xenbackend.cli.output import print_json
from xenbackend.errors import printable
from xenbackend.units import format_size


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "report",
        help="write an archive for a bug report",
        description="Write an archive with what helps to find a bug: versions, what doctor finds, status, orders, "
        "settings, logs, and what stands in xenstore about the disks. No image, passphrase or key is read, and what "
        "looks like a secret is masked; names of guests and paths of images are in it. Nothing is sent anywhere.",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a new file (default: xenbackend-report-HOST-TIME.tar.gz here)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"settings in TOML (default: {settings_file.PATH})")
    parser.add_argument(
        "--store", default="", metavar="PATH", help="xenstore's socket or device (default: the service's)"
    )
    parser.add_argument(
        "--log",
        type=Path,
        default=Path("/var/log/xenbackend.log"),
        metavar="FILE",
        help="the service's log, where systemd does not run (%(default)s)",
    )
    add_json(parser)
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Gather, write, and print what is in the archive. Raises: XenbackendError, if the file cannot be written."""
    from xenbackend.doctor import archive  # late: it speaks to xenstore
    from xenbackend.doctor.examine import Wanted
    from xenbackend.doctor.pieces import gather

    path = (args.output or Path(_name())).absolute()
    archive.check_new(path)
    pieces = gather(Wanted(args.socket, args.store, args.config), args.log)
    archive.write(pieces, path)
    listed = archive.contents(pieces)
    if args.json:
        print_json({"file": str(path), "contents": listed})
        return 0
    for each in listed:
        left_out = f", without the first {format_size(each['left_out'])}" if each["left_out"] else ""
        print(f"{each['name']}: {printable(each['problem']) or format_size(each['size'])}{left_out}")
    print(f"{path}: look through it before you send it; it has names of guests and paths of images")
    return 0


def _name() -> str:
    when = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"xenbackend-report-{platform.node().partition('.')[0] or 'host'}-{when}.tar.gz"
