"""`xenbackend upgrade` and `xenbackend stop`: other processes for the disks in service, or none.

Must not decide anything: the service does, or refuses.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from xenbackend.errors import XenbackendError
from xenbackend.protocol.client import DEFAULT_SOCKET, call


def register(subparsers: Any) -> None:
    """Add both commands."""
    parser = subparsers.add_parser(
        "upgrade",
        help="let new processes serve the disks",
        description="Replace the processes that serve disks, one after the other, by new ones of the program that is "
        "installed now. Guests only see that a request takes a moment. Restart the service itself first.",
    )
    parser.add_argument("vbd", nargs="?", default="", metavar="VBD", help="only this disk, such as 5/xvda")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="the service's socket (%(default)s)")
    parser.set_defaults(run=_upgrade)
    parser = subparsers.add_parser(
        "stop",
        help="end the service and its workers in order",
        description="Finish what is in flight, close every disk, and end the service: guests wait until it is started "
        "again. To restart the service without that, use systemctl restart.",
    )
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="the service's socket (%(default)s)")
    parser.set_defaults(run=_stop)


def _upgrade(args: argparse.Namespace) -> int:
    from rich.progress import track  # late: other commands of this module's family do without

    status = call(args.socket, {"verb": "status"})["data"]
    vbds = [args.vbd] if args.vbd else [f"{each['domid']}/{each['device']}" for each in status]
    failed = 0
    for vbd in track(vbds, "replacing", disable=not sys.stdout.isatty()):
        try:
            call(args.socket, {"verb": "upgrade", "vbd": vbd})
            print(f"{vbd} is served by a new process")
        except XenbackendError as problem:
            failed += 1
            print(f"{vbd}: {problem}", file=sys.stderr)
    return 1 if failed else 0


def _stop(args: argparse.Namespace) -> int:
    call(args.socket, {"verb": "stop"})
    print("the service ends once its disks are closed")
    return 0
