"""`xenbackend image`: what may be said to make, look at, check, change, copy and compare image files.

Must not do a verb, nor import what one needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

from xenbackend.block.images import FORMATS
from xenbackend.cli.arguments import size

_LAYERS = "vhd:FILE, qcow2:FILE, qcow:FILE or aio:FILE (raw)"
_WITH_TABLES = "the image with its format: vhd:FILE, qcow2:FILE or qcow:FILE"
_CHECK_STATUS = (
    "Exit status, as qemu-img check has it: 0 the image is sound; 1 it could not be checked; 2 it has errors, or is "
    "none that could be opened; 3 it has leaks only, which is lost room and no danger. What is left after --repair "
    "decides."
)


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "image",
        help="make, look at, check, change, copy and compare image files",
        description="What may be done to image files while no guest has them: an image in use is refused.",
    )
    verbs = parser.add_subparsers(dest="image_command", required=True, metavar="COMMAND")
    _register_create(verbs)
    _register_info(verbs)
    _register_check(verbs)
    _register_snapshot(verbs)
    _register_commit(verbs)
    _register_resize(verbs)
    _register_map(verbs)
    _register_convert(verbs)
    _register_compare(verbs)
    _register_measure(verbs)
    _register_rebase(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="print JSON")


def _register_create(verbs: Any) -> None:
    verb = verbs.add_parser("create", help="make an image", description="Make an image that reads as zeros, or as its "
        "parent. It appears whole or not at all, and never in the place of another file.")  # fmt: skip
    verb.add_argument("format", choices=FORMATS)
    verb.add_argument("file", metavar="FILE")
    verb.add_argument("size", metavar="SIZE", type=size, nargs="?", help="such as 20G (default: the parent's)")
    verb.add_argument("--parent", metavar="FILE", help="what it reads as at first; named relative to the new image")
    verb.add_argument("--parent-format", choices=FORMATS, help="what the parent is; that is never guessed")
    _add_wishes(verb)
    verb.set_defaults(run=_late("image_verbs", "create"))


def _register_info(verbs: Any) -> None:
    verb = verbs.add_parser("info", help="say what an image is", description="Say what an image or a chain is, and its "
        "parents. Of a FILE alone it finds out what it looks like; nothing else here does that. Of what cannot be "
        "served it says what is known, what is in the way and what to do, and ends with 2.")  # fmt: skip
    verb.add_argument("image", metavar="CHAIN_OR_FILE", help="such as qcow2:FILE, or just FILE")
    verb.set_defaults(run=_late("image_info", "info"))


def _register_check(verbs: Any) -> None:
    verb = verbs.add_parser("check", help="say whether an image is sound", description=_CHECK_STATUS)
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("--repair", action="store_true", help="repair what can be repaired without risk to data")
    verb.set_defaults(run=_late("image_check", "check"))


def _register_snapshot(verbs: Any) -> None:
    verb = verbs.add_parser("snapshot", help="make a child of an image", description="Make a new image of the same "
        "format whose parent is this one, which must not be written any more.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("new", metavar="NEW", help="the file of the new image")
    verb.set_defaults(run=_late("image_verbs", "snapshot"))


def _register_commit(verbs: Any) -> None:
    verb = verbs.add_parser("commit", help="write what an image has into its parent", description="Write what an image "
        "has into its parent. It may be stopped anywhere and done again. The image itself stays as it is; other "
        "children of the parent are worthless afterwards.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("--into", metavar="LAYER", help="its parent, if that has a data file: qcow2:FILE,data_file=FILE")
    _add_direct(verb)
    verb.set_defaults(run=_late("image_verbs", "commit"))


def _register_resize(verbs: Any) -> None:
    verb = verbs.add_parser("resize", help="make the disk of an image larger", description="Make the disk of an image "
        "larger; what is new reads as zeros. An image on a block device grows where that has room.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=f"the image with its format: {_LAYERS}")
    verb.add_argument("size", metavar="SIZE", type=size, help="such as 40G; never smaller than it is")
    verb.set_defaults(run=_late("image_verbs", "resize"))


def _register_map(verbs: Any) -> None:
    verb = verbs.add_parser("map", help="say which ranges of a disk are where", description="Say which ranges hold "
        "data or zeros, in which image of the chain (depth 0 is the first) and where in its file. --json is that of "
        "qemu-img map.")  # fmt: skip
    verb.add_argument("image", metavar="CHAIN", help="such as qcow2:FILE")
    verb.set_defaults(run=_late("image_show", "show_map"))


def _register_convert(verbs: Any) -> None:
    verb = verbs.add_parser("convert", help="make a new image of what a chain reads as", description="Make a new image "
        "of what a chain reads as; ranges of zeros take no room. Until it is complete its file is called TO.partial, "
        "beside TO.partial.json, which says how far it is; --resume goes on there if FROM is what it was.")  # fmt: skip
    verb.add_argument("source", metavar="FROM", help="any chain, such as qcow2:FILE, with its parents")
    verb.add_argument("target", metavar="TO", help=f"a new image: {_LAYERS}")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with what was stopped; where nothing was, begin")
    how.add_argument("--overwrite", action="store_true", help="TO is a raw image or a block device that is there "
        "already: write over what it holds, zeros too")  # fmt: skip
    verb.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_direct(verb)
    _add_wishes(verb)
    verb.set_defaults(run=_late("image_verbs", "convert"))


def _register_compare(verbs: Any) -> None:
    verb = verbs.add_parser("compare", help="say whether two chains read the same", description="Say whether two "
        "chains read the same, and where they differ first. Zeros behind the end of the smaller one are no difference. "
        "Exit status: 0 the same, 1 different, 2 it could not be found out.")  # fmt: skip
    verb.add_argument("first", metavar="CHAIN", help="such as qcow2:FILE")
    verb.add_argument("second", metavar="CHAIN", help="the other one")
    verb.add_argument("--strict", action="store_true", help="a different size is a difference, too")
    verb.add_argument("--quiet", action="store_true", help="no progress bar, and nothing on standard output")
    _add_direct(verb)
    verb.set_defaults(run=_late("image_verbs", "compare"))


def _register_measure(verbs: Any) -> None:
    verb = verbs.add_parser("measure", help="say how large a new image would be", description="Say how large the file "
        "of a new image becomes at most: what is needed for what a chain reads as, and for a full disk.")  # fmt: skip
    verb.add_argument("format", choices=FORMATS)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("source", metavar="FROM", nargs="?", help="any chain, such as qcow2:FILE, with its parents")
    what.add_argument("--size", metavar="SIZE", type=size, help="of an empty disk, such as 20G")
    _add_wishes(verb)
    verb.set_defaults(run=_late("image_verbs", "measure"))


def _register_rebase(verbs: Any) -> None:
    verb = verbs.add_parser("rebase", help="give an image another parent", description="Give an image another parent, "
        "or none; it reads as before: what it had from the former one, and would not have from the new one, is written "
        "into it. It may be stopped anywhere and done again.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help="the image with its format: vhd:FILE or qcow2:FILE")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--parent", metavar="FILE", help="the new parent; named relative to the image")
    what.add_argument("--no-parent", action="store_true", help="the image is to stand by itself")
    verb.add_argument("--parent-format", choices=FORMATS, help="what the new parent is; that is never guessed")
    verb.add_argument("--unsafe", action="store_true", help="change the name only, for a parent that was moved or "
        "exchanged: the image reads as the new one does wherever it has nothing itself")  # fmt: skip
    verb.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_direct(verb)
    verb.set_defaults(run=_late("image_verbs", "rebase"))


def _add_direct(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--direct", action="store_true", help="bypass the host's page cache (O_DIRECT), which leaves it "
        "to those who need it; as a rule slower")  # fmt: skip


def _add_wishes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--cluster-size", metavar="SIZE", type=size, default=0, help="of qcow2, qcow; of vhd, the block")
    verb.add_argument("--fixed", action="store_true", help="vhd: a fixed image, raw data with a footer")


def _late(module: str, verb: str) -> Callable[[argparse.Namespace], int]:
    """Return what imports the module of a verb when that is called: to import them all takes longer than most verbs."""

    def run(arguments: argparse.Namespace) -> int:
        function: Callable[[argparse.Namespace], int] = getattr(import_module(f"xenbackend.cli.{module}"), verb)
        return function(arguments)

    return run
