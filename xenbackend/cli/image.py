"""`xenbackend image`: the verbs that make, look at, check, change, copy and compare image files, and their options.

Must not carry out a verb, nor import what one needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

from xenbackend.block.formats.table import WRITTEN, layers
from xenbackend.cli.arguments import add_json, size

_TABLES = layers(tuple(each.name for each in WRITTEN.values() if each.cluster_size))
_WITH_TABLES = f"the image with its format: {', '.join(_TABLES[:-1])} or {_TABLES[-1]}"
_LAYERS = f"{', '.join(_TABLES)} or aio:FILE (raw)"
_REBASED = " or ".join(layers(tuple(each.name for each in WRITTEN.values() if each.can_rebase)))
_CHECK_STATUS = (
    "Check an image's tables. Exit status, as of qemu-img check: 0 the image is sound; 1 it could not be checked; 2 it "
    "has errors, or could not be opened; 3 it has only leaks, which waste space and are harmless. With --repair the "
    "status is that after the repair."
)


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "image",
        help="create, inspect, check, change, copy and compare image files",
        description="Work on image files that no guest uses. Commands other than `info` refuse an image in use.",
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
    _register_trust(verbs)
    _register_unlock(verbs)
    for verb in verbs.choices.values():
        add_json(verb)


def _register_create(verbs: Any) -> None:
    verb = verbs.add_parser("create", help="create an image", description="Create an image that reads as zeros, or as "
        "its parent. It appears complete or not at all, and never replaces another file.")  # fmt: skip
    verb.add_argument("format", choices=WRITTEN, help="of the new image")
    verb.add_argument("file", metavar="FILE", help="where to create it; must not exist yet")
    verb.add_argument("size", metavar="SIZE", type=size, nargs="?", help="such as 20G (default: the parent's)")
    verb.add_argument("--parent", metavar="FILE", help="the image that it reads as at first; relative to the new image")
    verb.add_argument("--parent-format", choices=WRITTEN, help="format of the parent; it is never guessed")
    verb.add_argument("--encrypt", metavar="KEY", help="raw: make an encrypted volume (LUKS2), whose passphrase is the "
        "whole content of the file KEY, or the service's credential:NAME; it reads as noise at first")  # fmt: skip
    verb.add_argument("--sector-size", type=int, choices=(512, 4096), help="bytes of an encrypted sector (4096, which "
        "is faster; firmware may need 512 to boot)")  # fmt: skip
    _add_wishes(verb)
    verb.set_defaults(run=_late("image_verbs", "create"))


def _register_info(verbs: Any) -> None:
    verb = verbs.add_parser("info", help="describe an image", description="Describe an image or a chain, and its "
        "parents. For a FILE without a driver it guesses the format; no other command does. For an image that cannot "
        "be served it prints what is known, what the obstacle is and what to do, and ends with status 2.")  # fmt: skip
    verb.add_argument("image", metavar="CHAIN_OR_FILE", help="such as qcow2:FILE, or just FILE")
    verb.set_defaults(run=_late("image_info", "info"))


def _register_check(verbs: Any) -> None:
    verb = verbs.add_parser("check", help="check whether an image is sound", description=_CHECK_STATUS)
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("--repair", action="store_true", help="repair what can be repaired without risk to data")
    verb.set_defaults(run=_late("image_check", "check"))


def _register_snapshot(verbs: Any) -> None:
    verb = verbs.add_parser("snapshot", help="create a child of an image", description="Create a new image of "
        "the same format whose parent is this one. The parent must not be written to any more.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("new", metavar="NEW", help="the file of the new image")
    verb.set_defaults(run=_late("image_verbs", "snapshot"))


def _register_commit(verbs: Any) -> None:
    verb = verbs.add_parser("commit", help="write an image's data into its parent", description="Write an image's data "
        "into its parent. It may be interrupted at any point and repeated. The image itself stays as it is; all other "
        "children of the parent become useless.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("--into", metavar="LAYER", help="its parent, if that has a data file: qcow2:FILE,data_file=FILE")
    _add_direct(verb)
    verb.set_defaults(run=_late("image_verbs", "commit"))


def _register_resize(verbs: Any) -> None:
    verb = verbs.add_parser("resize", help="enlarge the disk of an image", description="Enlarge the disk of an image; "
        "the new part reads as zeros. An image on a block device grows as far as the device has room.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=f"the image with its format: {_LAYERS}")
    verb.add_argument("size", metavar="SIZE", type=size, help="the new size, such as 40G; an image never shrinks")
    verb.set_defaults(run=_late("image_verbs", "resize"))


def _register_map(verbs: Any) -> None:
    verb = verbs.add_parser("map", help="show where the data of a disk are", description="Show which ranges hold data "
        "or zeros, in which image of the chain (depth 0 is the first) and where in its file. --json prints the same as "
        "qemu-img map --output=json.")  # fmt: skip
    verb.add_argument("image", metavar="CHAIN", help="such as qcow2:FILE")
    verb.add_argument("--since", metavar="NAME", help="what has changed since this snapshot of an image of a cluster; "
        "what has not is shown as absent")  # fmt: skip
    verb.set_defaults(run=_late("image_show", "show_map"))


def _register_convert(verbs: Any) -> None:
    verb = verbs.add_parser("convert", help="copy a chain into a new image", description="Copy what a chain reads as "
        "into a new image; ranges of zeros take no space. Until it is complete its file is called TO.partial, beside "
        "TO.partial.json, which records the progress; --resume continues there if FROM has not changed.")  # fmt: skip
    verb.add_argument("source", metavar="FROM", help="any chain, such as qcow2:FILE, with its parents")
    verb.add_argument("target", metavar="TO", help=f"a new image: {_LAYERS}, or rbd:POOL/IMAGE")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue an interrupted conversion; start if there is none")
    how.add_argument("--overwrite", action="store_true", help="TO is a raw image, a block device or a disk of a server "
        "or cluster that exists already: overwrite all of it, also with zeros")  # fmt: skip
    verb.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_direct(verb)
    _add_wishes(verb)
    verb.set_defaults(run=_late("image_verbs", "convert"))


def _register_compare(verbs: Any) -> None:
    verb = verbs.add_parser("compare", help="compare what two chains read as", description="Compare what two chains "
        "read as, and show where they differ first. Zeros beyond the end of the smaller one are no difference. Exit "
        "status: 0 the same, 1 different, 2 they could not be compared.")  # fmt: skip
    verb.add_argument("first", metavar="CHAIN", help="such as qcow2:FILE")
    verb.add_argument("second", metavar="CHAIN", help="the other one")
    verb.add_argument("--strict", action="store_true", help="treat different sizes as a difference, too")
    verb.add_argument("--quiet", action="store_true", help="no progress bar, and nothing on standard output")
    _add_direct(verb)
    verb.set_defaults(run=_late("image_verbs", "compare"))


def _register_measure(verbs: Any) -> None:
    verb = verbs.add_parser("measure", help="show how large a new image would be", description="Show how large the "
        "file of a new image can become: for what a chain reads as, and for a full disk.")  # fmt: skip
    verb.add_argument("format", choices=WRITTEN, help="of the new image")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("source", metavar="FROM", nargs="?", help="any chain, such as qcow2:FILE, with its parents")
    what.add_argument("--size", metavar="SIZE", type=size, help="of an empty disk, such as 20G")
    _add_wishes(verb)
    verb.set_defaults(run=_late("image_verbs", "measure"))


def _register_rebase(verbs: Any) -> None:
    verb = verbs.add_parser("rebase", help="give an image another parent", description="Give an image another parent, "
        "or none. It reads as before: data that it takes from the former parent, and that the new one does not have, "
        "are copied into it. It may be interrupted at any point and repeated.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=f"the image with its format: {_REBASED}")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--parent", metavar="FILE", help="the new parent; named relative to the image")
    what.add_argument("--no-parent", action="store_true", help="make the image independent of any parent")
    verb.add_argument("--parent-format", choices=WRITTEN, help="format of the new parent; it is never guessed")
    verb.add_argument("--unsafe", action="store_true", help="change only the parent's name, if the parent was moved or "
        "replaced: where the image has no data of its own, it will read as the new parent")  # fmt: skip
    verb.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_direct(verb)
    verb.set_defaults(run=_late("image_verbs", "rebase"))


def _register_trust(verbs: Any) -> None:
    verb = verbs.add_parser("trust", help="allow an image to be opened with its parents", description="Allow an image, "
        "and each of its parents, to be opened with the file that it names as its parent, and with those that hold its "
        "data. Each image is marked with these files, and from then on opened with them and no others. Check what is "
        "printed: the files were chosen by whoever made the image. An image in use may be marked, too.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help="the image with its format, such as qcow2:FILE")
    verb.set_defaults(run=_late("image_verbs", "trust"))


def _register_unlock(verbs: Any) -> None:
    verb = verbs.add_parser("unlock", help="take an image of a cluster from a host that is dead", description="Take "
        "the lock of an image of a cluster from an owner whose host has died, without the 30 s after which that is "
        "noticed. The owner is named, and is kept out: should that host come back, it cannot write for a year. Without "
        "--owner nothing is changed, and the owner of the lock is printed.")  # fmt: skip
    verb.add_argument("image", metavar="CHAIN", help="such as rbd:POOL/IMAGE")
    verb.add_argument("--owner", metavar="OWNER", default="", help="who has the lock, such as client.4123 or "
        "10.0.0.2:0/123")  # fmt: skip
    verb.set_defaults(run=_late("image_verbs", "unlock"))


def _add_direct(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--direct", action="store_true", help="bypass the host's page cache (O_DIRECT), which leaves it "
        "to others; usually slower")  # fmt: skip


def _add_wishes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--cluster-size", metavar="SIZE", type=size, default=0, help="cluster size of qcow2 and qcow, block size of vhd"
    )
    verb.add_argument("--fixed", action="store_true", help="vhd: a fixed image, which is raw data with a footer")


def _late(module: str, verb: str) -> Callable[[argparse.Namespace], int]:
    """Return a function that imports a verb's module when called: importing all takes longer than most verbs."""

    def run(arguments: argparse.Namespace) -> int:
        function: Callable[[argparse.Namespace], int] = getattr(import_module(f"xenbackend.cli.{module}"), verb)
        return function(arguments)

    return run
