"""`xenbackend attach` and `xenbackend detach`: a disk for a running guest without xl.

Must not know a key of xenstore, nor import a module that does before the command line has been checked.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.cli import output, waiting
from xenbackend.cli.arguments import Parser, add_json, add_order_options, add_socket, disk, duration
from xenbackend.disks import devid_to_vdev

_TAKING = ("--timeout", "--socket", "--store")  # options that are followed by a value


def register(subparsers: Any) -> None:
    """Add both commands."""
    parser = subparsers.add_parser(
        "attach",
        help="give a running guest a disk made of a chain",
        description="Give a running guest a disk, and return when its chain is open. The disk is gone after the "
        "guest's reboot, save or migration: it is not in the guest's configuration. A disk for the domain that this "
        "command runs in, such as 0, exists as soon as its name is printed: /dev/xvdq.",
    )
    _add_place(parser)
    parser.add_argument("chain", metavar="CHAIN", help="the chain, such as log:|aio:/img/disk.raw")
    parser.add_argument("--read-only", action="store_true", help="the guest may not write")
    parser.add_argument("--wait", action="store_true", help="return only when the guest is connected")
    add_order_options(parser)
    parser.set_defaults(run=run_attach)
    parser = subparsers.add_parser(
        "detach",
        help="take such a disk away again",
        description="Take a disk away from a guest, once the guest has released it.",
    )
    _add_place(parser)
    parser.add_argument("--force", action="store_true", help="even while the guest uses it")
    parser.add_argument(
        "--timeout",
        type=duration,
        default=10.0,
        metavar="SECONDS",
        help="wait no longer for the guest; then the exit status is 75 (%(default)s)",
    )
    add_json(parser)
    add_socket(parser)
    parser.set_defaults(run=run_detach)


def run_attach(args: argparse.Namespace) -> int:
    """Attach, and print the disk's name, or, in our own domain, the device's."""
    from xenbackend.supervisor.xenstore import toolstack
    from xenbackend.supervisor.xenstore.store import Store

    check_whole_paths(parse_chain(args.chain))
    with Store(args.store) as store:
        path = toolstack.find_vbd(store, args.vbd)
        wanted = toolstack.Attachment(path, args.chain, read_only=args.read_only)
        with waiting.shown(f"{path.disk}: attach") as show:
            answer = toolstack.attach(store, wanted, args.socket, args.timeout, waiting=show)
        is_ours = path.frontend_domid == path.backend_domid
        patience_s = toolstack.CONNECT_TIMEOUT_S if args.timeout is None else args.timeout
        if args.wait or is_ours:
            toolstack.wait_until_connected(store, path, patience_s)
    device = Path("/dev", devid_to_vdev(path.devid))
    if is_ours:
        toolstack.wait_until_there(device, patience_s)
    if args.json:
        found = {"device": str(device)} if is_ours else {}
        output.print_json({"vbd": path.disk, "chain": args.chain, **output.values_of(answer), **found})
    else:
        print(device if is_ours else f"attached {path.disk}")
    return 0


def run_detach(args: argparse.Namespace) -> int:
    """Detach."""
    from xenbackend.supervisor.xenstore import toolstack
    from xenbackend.supervisor.xenstore.store import Store

    with Store(args.store) as store:
        path = toolstack.find_attached(store, args.vbd)
        with waiting.shown(f"{path.disk}: detach") as show:
            toolstack.detach(store, path, args.timeout, force=args.force, waiting=show, service=args.socket)
    if args.json:
        output.print_json({"vbd": path.disk})
    else:
        print(f"detached {path.disk}")
    return 0


def _add_place(parser: Parser) -> None:
    parser.add_argument(
        "vbd", type=disk, metavar="DISK", help="the disk, such as 5/xvdb or guest/xvdb (or two words: 5 xvdb)"
    )
    parser.add_argument("--store", metavar="PATH", help="xenstore's socket or device")
    parser.rewrite = join_place


def join_place(words: list[str]) -> list[str]:
    """Return the words of a command line with a disk in two words, ``5 xvdb``, as one: ``5/xvdb``."""
    for place, (one, other) in enumerate(pairwise(words)):
        is_value = place > 0 and words[place - 1] in _TAKING
        device = other.removeprefix("/dev/")
        if one.isdigit() and not is_value and not device.startswith("-") and not {*"/:"} & {*device}:
            return [*words[:place], f"{one}/{device}", *words[place + 2 :]]
    return words
