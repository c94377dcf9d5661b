"""`xenbackend pause`, `resume`, `set`, `snapshot`, `resize`, `policy`: what is done to a disk while its guest runs.

Must not decide anything: the service does, or refuses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from xenbackend.block.formats.table import WRITTEN
from xenbackend.block.policy import DEFAULT, Policy
from xenbackend.cli import output, waiting
from xenbackend.cli.arguments import LinesHelp, add_order_options
from xenbackend.client import Changed, Client, Done, Layer, ServiceError
from xenbackend.disks import parse_disk
from xenbackend.errors import ConfigError, printable
from xenbackend.protocol.messages import own_snapshot
from xenbackend.units import format_size

_Done = TypeVar("_Done", bound=Done)
_FORMATS = tuple(each.name for each in WRITTEN.values() if each.parents)
_POLICY_HELP = f"""\
What happens to a request that the disk cannot carry out, by kind of error:

  enospc   no space left for a write
  read     any other error of a read
  write    any other error of a write
  flush    any error of a flush

and what can happen to it:

  pause             the request is kept, the guest waits, and it is tried again every second until it works
  retry N every Ts  it is kept and tried again up to N times, then the guest gets an error
  report            the guest gets an error

The default is {DEFAULT}; the setting on_error changes it for all disks.
A flush can only pause, and is not retried automatically: a guest takes an error for success and never flushes again,
and the kernel reports what it has lost only once. `xenbackend resume` lets the guest continue in spite of that.
"""


def register(subparsers: Any) -> None:
    """Add the commands."""
    _add(
        subparsers,
        "pause",
        _pause,
        "suspend a disk",
        "Take no more requests from a guest, and return when none is in flight. The guest only sees a slow disk. A "
        "pause outlives the service, but not the disk's detaching.",
    )
    _add(
        subparsers,
        "resume",
        _resume,
        "resume a disk, whatever the reason why it stopped",
        "Continue to serve a disk: after `pause`; after a failed flush, whose data remain lost; after workers that "
        "died one after the other.",
    )
    _register_chains(subparsers)
    parser = _add(subparsers, "policy", _policy, "choose what happens to requests that fail", _POLICY_HELP)
    parser.formatter_class = LinesHelp
    parser.add_argument(
        "policy", nargs="?", default="", metavar="POLICY", help="such as enospc=report (default: show the policy)"
    )


def _register_chains(subparsers: Any) -> None:
    """Add the commands that change what a guest's disk is made of."""
    parser = _add(
        subparsers,
        "set",
        _set,
        "switch a running guest to another chain",
        "Serve a running guest through another chain over the same content: to add or remove a filter, or to open an "
        "image with other options. The new chain is opened before the old one is given up; if it cannot be used, "
        "nothing changes. A chain with another file, device or image at its bottom is refused without --replace.",
    )
    parser.add_argument("chain", metavar="CHAIN", help="the new chain, such as log:|aio:/img/disk.raw")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="accept another file, device or image; its content must be the same",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the layers before and after; change nothing")
    parser = _add(
        subparsers,
        "snapshot",
        _snapshot,
        "put a new image over a running guest's",
        "Keep what a running guest's disk holds now: a new image FILE takes all writes from now on, and the former "
        "image becomes its read-only parent. The guest only sees one slow request. Put the new chain, which "
        "is printed, into the guest's configuration before it boots again: from the former image it would boot "
        "without all later writes. With @NAME an image of a cluster (rbd:) keeps what it holds itself: the chain stays "
        "as it is, and the layer that has the snapshot is printed.",
    )
    parser.add_argument("file", metavar="FILE|@NAME", help="the new image; must not exist yet")
    parser.add_argument(
        "--format",
        default="",
        choices=_FORMATS,
        help="default: the guest's own; over raw: qcow2",
    )
    _add(
        subparsers,
        "resize",
        _resize,
        "tell a running guest that its disk has grown",
        "Announce the new size of a disk to a running guest, after truncate or lvextend. A disk never shrinks.",
    )


def _add(
    subparsers: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=description)
    parser.add_argument("vbd", metavar="DISK", help="such as 5/xvda or guest/xvda")
    add_order_options(parser)
    parser.set_defaults(run=function, verb=name)
    return parser


def _pause(args: argparse.Namespace) -> int:
    done = _ask(args, lambda client: client.pause(args.vbd))
    return _print(args, done, f"{args.disk} is paused; to continue: xenbackend resume {args.disk}", paused=True)


def _resume(args: argparse.Namespace) -> int:
    return _print(args, _ask(args, lambda client: client.resume(args.vbd)), f"{args.disk} continues", paused=False)


def _set(args: argparse.Namespace) -> int:
    from xenbackend.block.spec import check_whole_paths, parse_chain  # late: other orders have no chain to read

    check_whole_paths(parse_chain(args.chain))
    if args.dry_run:
        planned = _ask(args, lambda client: client.plan(args.vbd, args.chain, replace=args.replace))
        return _print(args, planned, f"before: {_layers(planned.before)}\nafter: {_layers(planned.after)}")
    changed = _ask_for_chain(args, lambda client: client.set(args.vbd, args.chain, replace=args.replace))
    note = "; update the guest's configuration yourself"
    return _print(args, changed, f"{args.disk} is served by {printable(changed.chain)}{note}")


def _snapshot(args: argparse.Namespace) -> int:
    name = own_snapshot(args.file)
    if name is not None:
        from xenbackend.block.rbd.target import parse_name  # late: other orders have no such name

        parse_name(name)
        if args.format:
            raise ConfigError(f"{args.file} is a snapshot that the image keeps itself, in no format of its own")
    file = str(Path(args.file).absolute()) if name is None else args.file
    changed = _ask_for_chain(args, lambda client: client.snapshot(args.vbd, file, image_format=args.format))
    return _print(args, changed, printable(changed.chain if name is None else _with_snapshot(changed.chain, name)))


def _with_snapshot(chain: str, name: str) -> str:
    """Return the layer that has a snapshot of a chain's source."""
    from xenbackend.block import grammar  # late: other orders have no chain to read

    source = grammar.parse(chain)[-1]
    first, *others = (item.text for item in source.items)
    return grammar.format_layer(source.name, f"{first}@{name}", *others)


def _resize(args: argparse.Namespace) -> int:
    changed = _ask(args, lambda client: client.resize(args.vbd))
    size = changed.layers[0].size
    return _print(args, changed, f"{args.disk} has {format_size(size)}", size=size)


def _policy(args: argparse.Namespace) -> int:
    if args.policy:
        Policy(args.policy)  # report a mistake even without a service
    done = _ask(args, lambda client: client.policy(args.vbd, args.policy))
    return _print(args, done, done.policy, policy=done.policy)


def _ask(args: argparse.Namespace, give: Callable[[Client], _Done]) -> _Done:
    args.disk = parse_disk(args.vbd)
    return waiting.order(args, give)


def _ask_for_chain(args: argparse.Namespace, give: Callable[[Client], Changed]) -> Changed:
    """Ask; if that fails, print which chain is in service all the same, if the service says so."""
    try:
        return _ask(args, give)
    except ServiceError as problem:
        if not args.json and problem.chain:
            print(f"{args.disk} is served by {printable(problem.chain)}")
        raise


def _layers(layers: Sequence[Layer]) -> str:
    return " | ".join(printable(each.layer) for each in layers)


def _print(args: argparse.Namespace, done: Done, sentence: str, **more: object) -> int:
    if args.json:
        output.print_json({"vbd": str(args.disk), **output.values_of(done), **more})
    else:
        print(sentence)
    return 0
