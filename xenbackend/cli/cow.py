"""`xenbackend cow`: keep or drop what a guest has written to a disk whose `cow:` has an unnamed file.

Must not decide anything: the service does, or refuses.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from xenbackend.cli import output, waiting
from xenbackend.cli.arguments import add_order_options
from xenbackend.client import Changed
from xenbackend.disks import parse_disk
from xenbackend.errors import printable


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "cow",
        help="keep or drop what was written to a throw-away disk",
        description="What a guest writes to a disk of cow: without a file is gone when the disk is detached. Keep it "
        "in a file, or drop it before. See also: xenbackend drivers cow",
    )
    commands = parser.add_subparsers(dest="cow_command", required=True, metavar="COMMAND")
    keep = _add(
        commands,
        "keep",
        _keep,
        "give what was written a name",
        "Give the unnamed file of a disk in service the name FILE, which must be on the file system of the setting "
        "scratch. The guest only sees one slow request, and continues with cow:FILE. Put the new chain, which is "
        "printed, into the guest's configuration before it boots again.",
    )
    keep.add_argument("file", type=Path, metavar="FILE", help="must not exist yet")
    drop = _add(
        commands,
        "drop",
        _drop,
        "forget what was written",
        "Replace the unnamed file of a disk in service by a new one: the disk is again what lies below cow:.",
    )
    drop.add_argument(
        "--force", action="store_true", help="even while a guest uses the disk, whose content changes under it"
    )


def _add(commands: Any, verb: str, function: Any, text: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(verb, help=text, description=description)
    parser.add_argument("vbd", metavar="DISK", help="such as 5/xvda or guest/xvda")
    add_order_options(parser)
    parser.set_defaults(run=function, verb=f"cow {verb}")
    return parser


def _keep(args: argparse.Namespace) -> int:
    file = str(args.file.absolute())
    changed = waiting.order(args, lambda client: client.keep(args.vbd, file))
    return _print(args, changed, printable(changed.chain))


def _drop(args: argparse.Namespace) -> int:
    changed = waiting.order(args, lambda client: client.drop(args.vbd, force=args.force))
    return _print(args, changed, f"{parse_disk(args.vbd)} has the contents of the layer below cow: again")


def _print(args: argparse.Namespace, changed: Changed, sentence: str) -> int:
    if args.json:
        output.print_json({"vbd": str(parse_disk(args.vbd)), **output.values_of(changed)})
    else:
        print(sentence)
    return 0
