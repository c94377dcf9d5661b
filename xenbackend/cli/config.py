"""`xenbackend config show`: the settings that a service would use.

Must not ask the service: it read its settings when it was started.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from xenbackend import settings_file
from xenbackend.blkif.features import Limits
from xenbackend.cli.arguments import add_json
from xenbackend.cli.output import print_json
from xenbackend.supervisor.service.settings import Settings, load


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "config",
        help="show the service's settings",
        description="Show the settings that the service reads when it is started; `xenbackend run --check` says what "
        "is wrong with them.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = verbs.add_parser(
        "show",
        help="print every setting as TOML",
        description="Print every setting as TOML. Those that the file does not have are marked as defaults.",
    )
    show.add_argument("--config", type=Path, metavar="FILE", help=f"settings in TOML (default: {settings_file.PATH})")
    show.add_argument("--defaults", action="store_true", help="as they are without a file")
    add_json(show)
    show.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print all settings. Raises: ConfigError."""
    known = Settings() if args.defaults else load(args.config, {})
    if args.json:
        print_json({"settings": asdict(known)})
        return 0
    given = {} if args.defaults else settings_file.lines(args.config or settings_file.PATH)
    limits = fields(known.limits)
    lines = [_line(known, each.name, each.name in given) for each in fields(known) if each.name != "limits"]
    lines += ["", "[limits]", *(_line(known.limits, each.name, f"limits.{each.name}" in given) for each in limits)]
    print("\n".join(lines))
    return 0


def _line(table: Settings | Limits, name: str, is_given: bool) -> str:  # noqa: FBT001 - a column of a row
    value = json.dumps(getattr(table, name))  # texts, numbers and lists are TOML's too
    return f"{name} = {value}" if is_given else f"{name} = {value}  # default"
