"""`xenbackend run`: the service.

Must not do more than turn arguments into settings and start the service.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from xenbackend import settings_file
from xenbackend.cli.arguments import add_json
from xenbackend.cli.output import error_object, print_json
from xenbackend.errors import printable
from xenbackend.kernel import process
from xenbackend.log import FORMATS, LEVELS
from xenbackend.protocol.codes import EXIT_STATUS, Code
from xenbackend.supervisor.service import settings

OVERRIDES = ("store", "host", "socket", "serve", "log", "log_level")  # settings that options override


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "run",
        help="serve guests' disks",
        description="Run the service: watch xenstore, and serve the disks of guests, each by a process of its own, "
        "until SIGTERM or SIGINT. Options override the settings file. SIGTERM leaves disks in service if something "
        "keeps them for the next service (systemd, --keep, --detach); SIGINT closes them.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"settings in TOML (default: {settings_file.PATH})")
    parser.add_argument("--store", metavar="PATH", help="xenstore's socket or device")
    parser.add_argument("--host", metavar="MODULE[:ARGUMENT]", help="source of grants and event channels; for tests")
    parser.add_argument("--socket", metavar="PATH", help="control socket to listen on")
    parser.add_argument(
        "--serve", choices=("ours", "all"), help="serve only the disks whose hotplug script is ours, or all"
    )
    parser.add_argument("--log", choices=FORMATS, help="the log's format")
    parser.add_argument("--log-level", choices=LEVELS, help="the lowest level that is logged")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="restart the service when it dies, and keep what the next one needs to continue, as systemd does",
    )
    parser.add_argument("--detach", action="store_true", help="check the settings, then run as a daemon, with --keep")
    parser.add_argument(
        "--pid-file", type=Path, default=Path("/run/xenbackend.pid"), help="with --detach (%(default)s)"
    )
    parser.add_argument(
        "--log-file", type=Path, default=Path("/var/log/xenbackend.log"), help="with --detach (%(default)s)"
    )
    parser.add_argument(
        "--check", action="store_true", help="check the settings, print all mistakes, and serve nothing"
    )
    add_json(parser, "print an error that keeps the service from starting as JSON; for the log see --log json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, or only check."""
    if args.check:
        return _check(args)
    if not (args.detach or args.keep):
        process.boost(os.getpid())  # guests may wait, even while we import; `main` takes this back once it serves
    from xenbackend.supervisor.service import detached, main, parent
    from xenbackend.supervisor.service.keeper import forget_inheritance

    read = partial(_read, args)
    if args.detach:
        files = (args.pid_file.absolute(), args.log_file.absolute())
        return detached.run_detached(read(), _arguments(args), os.environ, *files)
    if args.keep:
        return parent.run(["run", *_arguments(args)], read().socket, os.environ)
    environment = dict(os.environ)
    forget_inheritance(os.environ)
    return main.run(read, environment)


def _read(args: argparse.Namespace) -> settings.Settings:
    return settings.load(args.config, {name: getattr(args, name) for name in OVERRIDES})


def _check(args: argparse.Namespace) -> int:
    """Print all mistakes in the settings; return the exit status. Raises: ConfigError, if they cannot be read."""
    try:
        _read(args)
    except settings.SettingsError as error:
        for each in error.mistakes:
            print(f"xenbackend: {printable(each)}", file=sys.stderr)
        if args.json:
            print_json({"mistakes": error.mistakes, **error_object(Code.INVALID, str(error))})
        return EXIT_STATUS[Code.INVALID]
    if args.json:
        print_json({"mistakes": []})
    else:
        print(f"{args.config or settings_file.PATH}: the settings can be used")
    return 0


def _arguments(args: argparse.Namespace) -> list[str]:
    """Return the arguments for the service itself, which hold in any working directory."""
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    for name in {"store", "socket"} & set(given):
        given[name] = str(Path(given[name]).absolute())
    config = [f"--config={args.config.absolute()}"] if args.config else []
    return config + [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
