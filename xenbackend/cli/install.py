"""`xenbackend install` and `xenbackend uninstall`: what a Xen host needs beside the program.

Must not know what is in a file, nor which steps make a host take it in.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from xenbackend.errors import ConfigError
from xenbackend.host import activate, manifest
from xenbackend.host.files import UNIT, items, shim
from xenbackend.host.install import KEPT, MADE, REMOVED, REPLACED, YOURS, Say, install, stage, uninstall
from xenbackend.host.program import PACKAGED, this_program
from xenbackend.host.served import control_sockets, refuse_while_serving
from xenbackend.host.tree import Tree
from xenbackend.xl.host import find_xl, running_xen
from xenbackend.xl.shim import SHIM_PLACE

_IF_DRY = {
    MADE: "would make",
    REPLACED: "would replace",
    KEPT: "would keep",
    YOURS: "would keep your",
    REMOVED: "would remove",
}


def register(subparsers: Any) -> None:
    """Add both commands."""
    parser = subparsers.add_parser(
        "install",
        help="put into this Xen host what xl and systemd need",
        description="Install the hotplug script for xl, a systemd unit, udev rules, a group and an example of the "
        "settings file, and start the service. What is right already is kept, settings that you changed too.",
    )
    _add_common(parser)
    parser.add_argument(
        "--shim",
        action=argparse.BooleanOptionalAction,
        help=f"make plain xl and xendomains take lines such as tap2:log:|aio:/img, by {SHIM_PLACE}; as it was before "
        "when not given",
    )
    parser.add_argument("--no-start", action="store_true", help="enable the service, but do not start it")
    parser.add_argument("--packaged", action="store_true", help="with --root: as the files of a distribution's package")
    parser.set_defaults(run=run_install)
    parser = subparsers.add_parser(
        "uninstall",
        help="take that away again",
        description="Stop the service and remove what install put there. What was changed since is kept.",
    )
    _add_common(parser)
    parser.add_argument("--purge", action="store_true", help="remove the settings too, and whatever was changed")
    parser.add_argument("--force", action="store_true", help="even while disks are served: their guests will hang")
    parser.set_defaults(run=run_uninstall)


def run_install(args: argparse.Namespace) -> int:
    """Install, and start what was installed where that is possible."""
    tree = Tree(args.root)
    say = _sayer(is_dry=args.dry_run)
    if args.packaged:
        _stage(args, tree, say)
        return 0
    _check_host(tree)
    program = this_program(sys.argv[0], sys.executable)
    chosen = items(program)
    if args.shim or (args.shim is None and SHIM_PLACE in manifest.load(tree).files):
        chosen.append(shim(program, _real_xl(tree)))
    is_live = _is_live(tree)
    was_serving = is_live and activate.is_serving()
    if not install(tree, chosen, say, is_dry=args.dry_run):
        _print("everything was in place already")
    elif was_serving and not args.dry_run:
        _print("the service still runs what was there before; to change that, at a pause to the guests:")
        _print(f"    systemctl restart {UNIT}")
    if is_live:
        _start(args)
    elif tree.is_host:
        _print("systemd does not run this system; start the service by: xenbackend run --detach")
    else:
        _print(f"to have the service started there: systemctl --root {args.root} enable {UNIT}")
    return 0


def run_uninstall(args: argparse.Namespace) -> int:
    """Stop the service and remove everything."""
    tree = Tree(args.root)
    _check_host(tree)
    uninstall(tree, lambda _done, _path: None, is_dry=True, is_purge=args.purge)  # refuses while all is untouched
    if tree.is_host and not args.force:
        for each in control_sockets():
            refuse_while_serving(each)
    is_live = _is_live(tree)
    if is_live:
        _take(activate.stopping(), is_dry=args.dry_run)
    uninstall(tree, _sayer(is_dry=args.dry_run), is_dry=args.dry_run, is_purge=args.purge)
    if is_live:
        _take(activate.forgetting(), is_dry=args.dry_run)
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="a system in a directory (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and touch nothing")


def _stage(args: argparse.Namespace, tree: Tree, say: Say) -> None:
    if tree.is_host or args.dry_run:
        raise ConfigError("--packaged is for building a package: it needs --root, and knows no --dry-run")
    stage(tree, items(PACKAGED), say)


def _start(args: argparse.Namespace) -> None:
    _take(activate.starting(starts=not args.no_start), is_dry=args.dry_run)
    if not (args.dry_run or args.no_start or activate.is_serving()):
        _print(f"the service does not run: this system was not booted under Xen; see: systemctl status {UNIT}")


def _real_xl(tree: Tree) -> str:
    return str(find_xl(os.environ.get("PATH", ""), running_xen())) if tree.is_host else "/usr/sbin/xl"


def _check_host(tree: Tree) -> None:
    """Raise ConfigError when this cannot be the Xen host that is to be changed."""
    if not tree.is_host:
        return
    if not tree.at("/etc/xen").is_dir():
        raise ConfigError("this is no Xen host: there is no /etc/xen; --root DIR names another system")
    if os.geteuid() != 0:
        raise ConfigError("only root may do that to this system; try: sudo xenbackend ...")


def _is_live(tree: Tree) -> bool:
    return tree.is_host and activate.is_possible()


def _take(steps: list[activate.Command], *, is_dry: bool) -> None:
    if is_dry:
        for step in steps:
            _print("would run", *step)
    else:
        activate.run(steps, lambda step: _print("ran", *step))


def _sayer(*, is_dry: bool) -> Say:
    """Return what prints a line for each file."""

    def say(done: str, path: str) -> None:
        _print(_IF_DRY[done] if is_dry else done, path)

    return say


def _print(*words: str) -> None:
    """Print a line. A reader who has seen enough must not end an installation in the middle."""
    with suppress(BrokenPipeError):
        print(*words, flush=True)
