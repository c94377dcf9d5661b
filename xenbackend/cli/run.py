"""`xenbackend run`: the service.

Must not do anything but turn arguments into settings.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from xenbackend.log import FORMATS, LEVELS
from xenbackend.supervisor import settings


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("run", help="serve guests' disks", description="Serve guests' disks.")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"settings in TOML (default: {settings.PATH})")
    parser.add_argument("--store", metavar="PATH", help="xenstore's socket or device")
    parser.add_argument("--host", metavar="MODULE[:ARGUMENT]", help="where grants and event channels come from")
    parser.add_argument("--socket", metavar="PATH", help="control socket to listen on")
    parser.add_argument("--serve", choices=("ours", "all"), help="vbds whose script is ours, or all")
    parser.add_argument("--log", choices=FORMATS, help="how to write the log")
    parser.add_argument("--log-level", choices=LEVELS, help="the least level that is written")
    parser.add_argument("--detach", action="store_true", help="become a daemon once all is checked")
    parser.add_argument(
        "--pid-file", type=Path, default=Path("/run/xenbackend.pid"), help="with --detach (%(default)s)"
    )
    parser.add_argument(
        "--log-file", type=Path, default=Path("/var/log/xenbackend.log"), help="with --detach (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from xenbackend.supervisor import main

    names = ("store", "host", "socket", "serve", "log", "log_level")
    chosen = settings.load(args.config, {name: getattr(args, name) for name in names})
    if args.detach:
        return main.run_detached(chosen, args.pid_file.absolute(), args.log_file.absolute())
    return main.run(chosen, os.environ)
