"""`xenbackend upgrade` and `xenbackend stop`: replace or end the processes that serve disks.

Must not decide anything: the service does, or refuses.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from xenbackend.cli import output, waiting
from xenbackend.cli.arguments import add_order_options
from xenbackend.client import Client, ServiceError, Upgraded
from xenbackend.disks import parse_disk
from xenbackend.errors import printable
from xenbackend.protocol.codes import EXIT_STATUS

LOOK_TIMEOUT_S = 1.0  # for the question what the service waits for, which is only shown
NAMED = 3  # disks that a line has room for


def register(subparsers: Any) -> None:
    """Add both commands."""
    parser = subparsers.add_parser(
        "upgrade",
        help="replace the processes that serve disks by new ones",
        description="Replace the processes that serve disks, one after the other, by new ones of the program that is "
        "installed now. Guests only see one slow request. Restart the service itself first.",
    )
    parser.add_argument("vbd", nargs="?", default="", metavar="DISK", help="only this disk, such as 5/xvda")
    add_order_options(parser)
    parser.set_defaults(run=_upgrade, verb="upgrade")
    parser = subparsers.add_parser(
        "stop",
        help="stop the service and its workers in order",
        description="Finish what is in flight, close every disk, and end the service: guests hang until it is started "
        "again. To restart the service without that, use systemctl restart. If xenstore is away and has not been "
        "told which chain is in service, the service waits for it, up to 45 s, and then writes it into a file for "
        "the next service. A terminal shows what it waits for.",
    )
    parser.add_argument(
        "--force", action="store_true", help="even if guests lose what they wrote to disks of cow: without a file"
    )
    add_order_options(parser)
    parser.set_defaults(run=_stop, verb="stop")


def _upgrade(args: argparse.Namespace) -> int:
    if args.vbd:
        done = _replace(args, args.vbd)
        name = str(parse_disk(args.vbd))
        if args.json:
            output.print_json({"vbd": name, **output.values_of(done)})
        else:
            print(f"{name} is served by a new process")
        return 0
    return _upgrade_all(args)


def _replace(args: argparse.Namespace, vbd: str) -> Upgraded:
    return waiting.order(args, lambda client: client.upgrade(vbd))


def _upgrade_all(args: argparse.Namespace) -> int:
    """Replace one worker after another; return 0, or the status of the first order that failed."""
    status, done = 0, []
    for disk in Client(args.socket).disks():
        args.vbd = name = disk.vbd
        try:
            upgraded = _replace(args, name)
        except ServiceError as problem:
            print(f"xenbackend: {name}: {printable(problem.sentence)}", file=sys.stderr)
            failed = output.error_object(problem.code, problem.sentence)
            done.append({"vbd": name, **output.values_of(problem.answer), **failed})
            status = status or EXIT_STATUS[problem.code]
        else:
            done.append({"vbd": name, **output.values_of(upgraded)})
            if not args.json:
                print(f"{name} is served by a new process", flush=True)
    if args.json:
        output.print_json({"vbds": done})
    return status


def _waits_for(socket: str) -> str:
    """Return what a stopping service waits for, at the first few disks; empty if it does not say."""
    try:
        waits = Client(socket, answer_s=LOOK_TIMEOUT_S).service().waits
    except ServiceError:
        return ""
    named = [printable(f"{each.vbd}: {each.for_}") for each in waits[:NAMED]]
    return "; ".join([*named, *([f"{len(waits) - NAMED} more"] if len(waits) > NAMED else [])])


def _stop(args: argparse.Namespace) -> int:
    try:
        stopped = waiting.order(args, lambda client: client.stop(force=args.force), lambda: _waits_for(args.socket))
    except ServiceError as problem:
        known = problem.answer.data if isinstance(problem.answer.data, dict) else {}
        for each in [] if args.json else known.get("waits", []):
            print(printable(f"the service waits for {each['vbd']}: {each['for']}"), file=sys.stderr)
        raise
    if args.json:
        output.print_json(output.values_of(stopped))
    else:
        print("the service is ending; its disks are closed")
        for each in stopped.untold:
            said = f"{each.vbd} was served by {each.chain}, which xenstore could not be told"
            if each.next_chain:
                said = f"{each.vbd} was served by {each.chain} or {each.next_chain}, which was replacing it"
            print(f"{printable(said)}; a file tells the next service", file=sys.stderr)
    return 0
