"""`xenbackend run`: the service.

Must not do anything but turn arguments into settings.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from xenbackend import settings_file
from xenbackend.cli.arguments import add_json
from xenbackend.kernel import process
from xenbackend.log import FORMATS, LEVELS
from xenbackend.supervisor.service import settings


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "run",
        help="serve guests' disks",
        description="Run the service: watch xenstore, and serve the disks of guests, each by a process of its own, "
        "until SIGTERM or SIGINT. Options override the settings file. SIGTERM leaves disks in service where somebody "
        "keeps them for the next service (systemd, --keep, --detach); SIGINT closes them.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"settings in TOML (default: {settings_file.PATH})")
    parser.add_argument("--store", metavar="PATH", help="xenstore's socket or device")
    parser.add_argument("--host", metavar="MODULE[:ARGUMENT]", help="source of grants and event channels; for tests")
    parser.add_argument("--socket", metavar="PATH", help="control socket to listen on")
    parser.add_argument("--serve", choices=("ours", "all"), help="serve only disks whose script is ours, or all")
    parser.add_argument("--log", choices=FORMATS, help="the log's format")
    parser.add_argument("--log-level", choices=LEVELS, help="the lowest level that is logged")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="restart the service when it dies, and keep what the next one needs to continue (as systemd does)",
    )
    parser.add_argument("--detach", action="store_true", help="check the settings, then run as a daemon, with --keep")
    parser.add_argument(
        "--pid-file", type=Path, default=Path("/run/xenbackend.pid"), help="with --detach (%(default)s)"
    )
    parser.add_argument(
        "--log-file", type=Path, default=Path("/var/log/xenbackend.log"), help="with --detach (%(default)s)"
    )
    add_json(parser, "print an error that keeps the service from starting as JSON; for the log see --log json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    if not (args.detach or args.keep):
        process.boost(os.getpid())  # guests may wait for us, also while we import; `main` calms us once we serve
    from xenbackend.supervisor.service import detached, main, parent
    from xenbackend.supervisor.service.keeper import forget_inheritance

    names = ("store", "host", "socket", "serve", "log", "log_level")

    def read() -> settings.Settings:
        return settings.load(args.config, {name: getattr(args, name) for name in names})

    if args.detach:
        files = (args.pid_file.absolute(), args.log_file.absolute())
        return detached.run_detached(read(), _arguments(args, names), os.environ, *files)
    if args.keep:
        return parent.run(["run", *_arguments(args, names)], read().socket, os.environ)
    environment = dict(os.environ)
    forget_inheritance(os.environ)
    return main.run(read, environment)


def _arguments(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Return what the service itself is started with, for any directory."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in {"store", "socket"} & set(given):
        given[name] = str(Path(given[name]).absolute())
    config = [f"--config={args.config.absolute()}"] if args.config else []
    return config + [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
