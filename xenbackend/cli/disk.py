"""`xenbackend pause`, `resume`, `set`, `snapshot`, `resize`, `policy`: what is done to a disk while its guest runs.

Must not decide anything: the service does, or refuses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xenbackend.block.policy import DEFAULT
from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.errors import printable
from xenbackend.protocol.client import DEFAULT_SOCKET, call
from xenbackend.units import format_size

_POLICY_HELP = f"""\
What becomes of a request that the disk cannot do, by kind of error:

  enospc   no space left, of writes
  read     any other error of a read
  write    any other error of a write
  flush    any error of a flush

and what may become of it:

  pause             it is kept, the guest waits, and it is tried again every second until it works
  retry N every Ts  it is kept and tried again up to N times, then the guest gets an error
  report            the guest gets an error

The default is {DEFAULT}; the setting on_error changes it for all disks.
A flush can only pause, and is not tried again by itself: a guest takes an error for success and never flushes again,
and the kernel tells only once what it has lost. `xenbackend resume` says that the guest may go on all the same.
"""


def register(subparsers: Any) -> None:
    """Add the commands."""
    _add(
        subparsers,
        "pause",
        _pause,
        "let a guest's requests wait",
        "Take no more requests from a guest, and return when nothing is in flight. The guest only sees that its disk "
        "takes long. This outlives the service, but not the disk's detaching.",
    )
    _add(
        subparsers,
        "resume",
        _resume,
        "serve a disk on, whatever stopped it",
        "Serve a disk on: after `pause`; after a flush that failed, whose loss stays lost; after workers that died one "
        "after the other.",
    )
    _register_chains(subparsers)
    parser = _add(subparsers, "policy", _policy, "choose what becomes of requests that fail", _POLICY_HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("policy", nargs="?", default="", metavar="POLICY", help="enospc=report,...; none: show it")


def _register_chains(subparsers: Any) -> None:
    """Add the commands that exchange what is below a guest."""
    parser = _add(
        subparsers,
        "set",
        _set,
        "put another chain below a running guest",
        "Serve a running guest through another chain: a filter put in or taken out, an image in the place of another "
        "one with the same content. The chain is looked at first; if it cannot be used, nothing happens.",
    )
    parser.add_argument("chain", metavar="CHAIN", help="the chain, such as log:|aio:/img/disk.raw")
    parser = _add(
        subparsers,
        "snapshot",
        _snapshot,
        "put a new image over a running guest's",
        "Keep what a running guest's disk holds now: a new image FILE takes its writes from now on, and the one that "
        "it wrote to becomes its parent, which is only read. The guest only sees that a request takes a moment. Its "
        "configuration has to name the new chain, which is printed, before it boots again: from the old image it would "
        "boot without all that it wrote since.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the new image; nothing may be there yet")
    parser.add_argument(
        "--format", default="", choices=("vhd", "qcow2", "qcow"), help="as the guest's; over raw: qcow2"
    )
    _add(
        subparsers,
        "resize",
        _resize,
        "let a running guest see that its disk has grown",
        "Announce to a running guest that its image has grown, by truncate or lvextend. A disk never shrinks.",
    )


def _add(
    subparsers: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=description)
    parser.add_argument("vbd", metavar="VBD", help="the disk, such as 5/xvda")
    parser.add_argument("--json", action="store_true", help="print the answer for scripts")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="the service's socket (%(default)s)")
    parser.set_defaults(run=function, verb=name)
    return parser


def _pause(args: argparse.Namespace) -> int:
    return _print(args, _ask(args), f"{args.vbd} waits; `xenbackend resume {args.vbd}` lets it go on")


def _resume(args: argparse.Namespace) -> int:
    return _print(args, _ask(args), f"{args.vbd} goes on")


def _set(args: argparse.Namespace) -> int:
    check_whole_paths(parse_chain(args.chain))
    answer = _ask(args, chain=args.chain)
    return _print(
        args, answer, f"{args.vbd} is served by {answer['chain']}; the guest's configuration is yours to change"
    )


def _snapshot(args: argparse.Namespace) -> int:
    answer = _ask(args, file=str(args.file.absolute()), format=args.format)
    return _print(args, answer, printable(answer["chain"]))


def _resize(args: argparse.Namespace) -> int:
    answer = _ask(args)
    return _print(args, answer, f"{args.vbd} has {format_size(answer['layers'][0]['size'])}")


def _policy(args: argparse.Namespace) -> int:
    answer = _ask(args, policy=args.policy)
    return _print(args, answer, answer)


def _ask(args: argparse.Namespace, **more: str) -> Any:
    return call(args.socket, {"verb": args.verb, "vbd": args.vbd, **more})["data"]


def _print(args: argparse.Namespace, answer: Any, sentence: str) -> int:
    print(json.dumps(answer) if args.json else sentence)
    return 0
