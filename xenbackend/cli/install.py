"""`xenbackend install` and `xenbackend uninstall`: what a Xen host needs beside the program.

Must not know what is in a file, nor which steps make a host use it.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from xenbackend.cli import output
from xenbackend.cli.arguments import add_json
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
        help="install what xl and systemd need on this Xen host",
        description="Install the hotplug script for xl, a systemd unit, udev rules, a group and an example of the "
        "settings file, and start the service. Safe to re-run: correct files and your settings are kept.",
    )
    _add_common(parser)
    parser.add_argument(
        "--shim",
        action=argparse.BooleanOptionalAction,
        help=f"let plain xl and xendomains take lines such as tap2:log:|aio:/img, by {SHIM_PLACE}; without this "
        "option that stays as it is",
    )
    parser.add_argument("--no-start", action="store_true", help="enable the service, but do not start it")
    parser.add_argument(
        "--packaged", action="store_true", help="with --root: lay out the files for a distribution's package"
    )
    parser.set_defaults(run=run_install)
    parser = subparsers.add_parser(
        "uninstall",
        help="remove that again",
        description="Stop the service and remove what install installed. Files that were changed since are kept.",
    )
    _add_common(parser)
    parser.add_argument("--purge", action="store_true", help="remove the settings and all changed files, too")
    parser.add_argument(
        "--force", action="store_true", help="even while disks are being served; their guests will hang"
    )
    parser.set_defaults(run=run_uninstall)


class Told:
    """Reports what is done, line by line, or at the end as JSON."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._is_dry: bool = args.dry_run
        self._as_json: bool = args.json
        self._steps: list[dict[str, str]] = []
        self._notes: list[str] = []

    def file(self, done: str, path: str) -> None:
        """Report what was done with a file."""
        self._step(_IF_DRY[done] if self._is_dry else done, "file", path)

    def take(self, steps: list[activate.Command]) -> None:
        """Run commands, and report each. Raises: XenbackendError."""
        if self._is_dry:
            for step in steps:
                self._step("would run", "command", " ".join(step))
        else:
            activate.run(steps, lambda step: self._step("ran", "command", " ".join(step)))

    def note(self, sentence: str) -> None:
        """Report what the operator must know."""
        self._notes.append(sentence)
        self._print(sentence)

    def end(self) -> int:
        """Print the JSON, if it is wanted, and return the exit status."""
        if self._as_json:
            with suppress(BrokenPipeError):
                output.print_json({"steps": self._steps, "notes": self._notes}, indent=2)
        return 0

    def _step(self, done: str, kind: str, what: str) -> None:
        self._steps.append({"done": done, kind: what})
        self._print(f"{done} {what}")

    def _print(self, line: str) -> None:
        """Print a line. If the reader of a pipe has gone, the installation must still be finished."""
        if not self._as_json:
            with suppress(BrokenPipeError):
                print(line, flush=True)


def run_install(args: argparse.Namespace) -> int:
    """Install, and start what was installed if that is possible."""
    tree, told = Tree(args.root), Told(args)
    if args.packaged:
        _stage(args, tree, told.file)
        return told.end()
    _check_host(tree)
    program = this_program(sys.argv[0], sys.executable)
    chosen = items(program)
    if args.shim or (args.shim is None and SHIM_PLACE in manifest.load(tree).files):
        chosen.append(shim(program, _real_xl(tree)))
    is_live = _is_live(tree)
    was_serving = is_live and activate.is_serving()
    if not install(tree, chosen, told.file, is_dry=args.dry_run):
        told.note("everything was already in place")
    elif was_serving and not args.dry_run:
        told.note("the service still runs the former version; to restart it, with a short pause for the guests:")
        told.note(f"    systemctl restart {UNIT}")
    if is_live:
        told.take(activate.starting(starts=not args.no_start))
        if not (args.dry_run or args.no_start or activate.is_serving()):
            told.note(f"the service does not run: this system was not booted under Xen; see: systemctl status {UNIT}")
    elif tree.is_host:
        told.note("systemd does not run this system; start the service with: xenbackend run --detach")
    else:
        told.note(f"to have the service started there: systemctl --root {args.root} enable {UNIT}")
    return told.end()


def run_uninstall(args: argparse.Namespace) -> int:
    """Stop the service and remove everything."""
    tree, told = Tree(args.root), Told(args)
    _check_host(tree)
    uninstall(tree, lambda _done, _path: None, is_dry=True, is_purge=args.purge)  # refuses before anything is touched
    if tree.is_host and not args.force:
        for each in control_sockets():
            refuse_while_serving(each)
    is_live = _is_live(tree)
    if is_live:
        told.take(activate.stopping())
    uninstall(tree, told.file, is_dry=args.dry_run, is_purge=args.purge)
    if is_live:
        told.take(activate.forgetting())
    return told.end()


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="a system in a directory (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done; change nothing")
    add_json(parser)


def _stage(args: argparse.Namespace, tree: Tree, say: Say) -> None:
    if tree.is_host or args.dry_run:
        raise ConfigError("--packaged is for building a package: it needs --root, and excludes --dry-run")
    stage(tree, items(PACKAGED), say)


def _real_xl(tree: Tree) -> str:
    return str(find_xl(os.environ.get("PATH", ""), running_xen())) if tree.is_host else "/usr/sbin/xl"


def _check_host(tree: Tree) -> None:
    """Raise ConfigError if this host is to be changed, and is no Xen host or we are not root."""
    if not tree.is_host:
        return
    if not tree.at("/etc/xen").is_dir():
        raise ConfigError("this is not a Xen host: there is no /etc/xen; name another system with --root DIR")
    if os.geteuid() != 0:
        raise ConfigError("only root may do that to this system; try: sudo xenbackend ...")


def _is_live(tree: Tree) -> bool:
    return tree.is_host and activate.is_possible()
