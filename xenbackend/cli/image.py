"""`xenbackend image`: make, look at, check, grow, commit and convert image files while no guest has them.

Must not do what `xenbackend.image` should; a verb here is its arguments, one call, and a sentence.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xenbackend.cli.arguments import size
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from xenbackend.block.formats.blank import Wishes
    from xenbackend.block.spec import ChainSpec
    from xenbackend.image.check import Verdict
    from xenbackend.image.compare import Compared
    from xenbackend.image.create import Created
    from xenbackend.image.names import Image

_FORMATS = ("raw", "vhd", "qcow2", "qcow")
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
        help="make, look at, check, grow, commit and convert image files",
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
    verb.add_argument("format", choices=_FORMATS)
    verb.add_argument("file", metavar="FILE")
    verb.add_argument("size", metavar="SIZE", type=size, nargs="?", help="such as 20G (default: the parent's)")
    verb.add_argument("--parent", metavar="FILE", help="what it reads as at first; named relative to the new image")
    verb.add_argument("--parent-format", choices=_FORMATS, help="what the parent is; that is never guessed")
    _add_wishes(verb)
    verb.set_defaults(run=create)


def _register_info(verbs: Any) -> None:
    verb = verbs.add_parser("info", help="say what an image is", description="Say what an image or a chain is, and its "
        "parents. Of a FILE alone it finds out what it looks like; nothing else here does that. Of what cannot be "
        "served it says what is known, what is in the way and what to do, and ends with 2.")  # fmt: skip
    verb.add_argument("image", metavar="CHAIN_OR_FILE", help="such as qcow2:FILE, or just FILE")
    verb.set_defaults(run=info)


def _register_check(verbs: Any) -> None:
    verb = verbs.add_parser("check", help="say whether an image is sound", description=_CHECK_STATUS)
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("--repair", action="store_true", help="repair what can be repaired without risk to data")
    verb.set_defaults(run=check)


def _register_snapshot(verbs: Any) -> None:
    verb = verbs.add_parser("snapshot", help="make a child of an image", description="Make a new image of the same "
        "format whose parent is this one, which must not be written any more.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("new", metavar="NEW", help="the file of the new image")
    verb.set_defaults(run=snapshot)


def _register_commit(verbs: Any) -> None:
    verb = verbs.add_parser("commit", help="write what an image has into its parent", description="Write what an image "
        "has into its parent. It may be stopped anywhere and done again. The image itself stays as it is; other "
        "children of the parent are worthless afterwards.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=_WITH_TABLES)
    verb.add_argument("--into", metavar="LAYER", help="its parent, if that has a data file: qcow2:FILE,data_file=FILE")
    _add_direct(verb)
    verb.set_defaults(run=commit)


def _register_resize(verbs: Any) -> None:
    verb = verbs.add_parser("resize", help="make the disk of an image larger", description="Make the disk of an image "
        "larger; what is new reads as zeros. An image on a block device grows where that has room.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help=f"the image with its format: {_LAYERS}")
    verb.add_argument("size", metavar="SIZE", type=size, help="such as 40G; never smaller than it is")
    verb.set_defaults(run=resize)


def _register_map(verbs: Any) -> None:
    verb = verbs.add_parser("map", help="say which ranges of a disk are where", description="Say which ranges hold "
        "data or zeros, in which image of the chain (depth 0 is the first) and where in its file. --json is that of "
        "qemu-img map.")  # fmt: skip
    verb.add_argument("image", metavar="CHAIN", help="such as qcow2:FILE")
    verb.set_defaults(run=show_map)


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
    verb.set_defaults(run=convert)


def _register_compare(verbs: Any) -> None:
    verb = verbs.add_parser("compare", help="say whether two chains read the same", description="Say whether two "
        "chains read the same, and where they differ first. Zeros behind the end of the smaller one are no difference. "
        "Exit status: 0 the same, 1 different, 2 it could not be found out.")  # fmt: skip
    verb.add_argument("first", metavar="CHAIN", help="such as qcow2:FILE")
    verb.add_argument("second", metavar="CHAIN", help="the other one")
    verb.add_argument("--strict", action="store_true", help="a different size is a difference, too")
    verb.add_argument("--quiet", action="store_true", help="no progress bar, and nothing on standard output")
    _add_direct(verb)
    verb.set_defaults(run=compare)


def _register_measure(verbs: Any) -> None:
    verb = verbs.add_parser("measure", help="say how large a new image would be", description="Say how large the file "
        "of a new image becomes at most: what is needed for what a chain reads as, and for a full disk.")  # fmt: skip
    verb.add_argument("format", choices=_FORMATS)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("source", metavar="FROM", nargs="?", help="any chain, such as qcow2:FILE, with its parents")
    what.add_argument("--size", metavar="SIZE", type=size, help="of an empty disk, such as 20G")
    _add_wishes(verb)
    verb.set_defaults(run=measure)


def _register_rebase(verbs: Any) -> None:
    verb = verbs.add_parser("rebase", help="give an image another parent", description="Give an image another parent, "
        "or none; it reads as before: what it had from the former one, and would not have from the new one, is written "
        "into it. It may be stopped anywhere and done again.")  # fmt: skip
    verb.add_argument("image", metavar="LAYER", help="the image with its format: vhd:FILE or qcow2:FILE")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--parent", metavar="FILE", help="the new parent; named relative to the image")
    what.add_argument("--no-parent", action="store_true", help="the image is to stand by itself")
    verb.add_argument("--parent-format", choices=_FORMATS, help="what the new parent is; that is never guessed")
    verb.add_argument("--unsafe", action="store_true", help="change the name only, for a parent that was moved or "
        "exchanged: the image reads as the new one does wherever it has nothing itself")  # fmt: skip
    verb.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_direct(verb)
    verb.set_defaults(run=rebase)


def _add_direct(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--direct", action="store_true", help="bypass the host's page cache (O_DIRECT), which leaves it "
        "to those who need it; as a rule slower")  # fmt: skip


def _add_wishes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--cluster-size", metavar="SIZE", type=size, default=0, help="of qcow2, qcow; of vhd, the block")
    verb.add_argument("--fixed", action="store_true", help="vhd: a fixed image, raw data with a footer")


def create(arguments: argparse.Namespace) -> int:
    """Make an image. Raises: ConfigError, DriverError."""
    from xenbackend.image.create import create as make

    made = make(arguments.format, arguments.file, arguments.size, _wishes(arguments), _parent(arguments))
    return _print_created(made, as_json=arguments.json)


def snapshot(arguments: argparse.Namespace) -> int:
    """Make a child. Raises: ConfigError, DriverError."""
    from xenbackend.image.create import snapshot as make
    from xenbackend.image.names import find_image

    return _print_created(make(find_image(arguments.image), arguments.new), as_json=arguments.json)


def info(arguments: argparse.Namespace) -> int:
    """Say what an image is. Raises: ChainError, DriverError."""
    from xenbackend.cli import image_info

    return image_info.info(arguments)


def show_map(arguments: argparse.Namespace) -> int:
    """Say which ranges are where. Raises: ChainError, ConfigError, DriverError."""
    from xenbackend.cli import image_show

    return image_show.show_map(arguments)


def check(arguments: argparse.Namespace) -> int:
    """Check an image; the status is qemu-img's. Raises: ConfigError, DriverError."""
    from xenbackend.image import check as checks
    from xenbackend.image.names import find_image

    look: Callable[[Image], Verdict] = checks.repair if arguments.repair else checks.check
    verdict = look(find_image(arguments.image, ("vhd", "qcow2", "qcow")))
    if arguments.json:
        _print_json({**asdict(verdict), "status": verdict.status})
        return verdict.status
    for sentence in verdict.sentences:
        print(printable(sentence))
    if verdict.repaired:
        print(f"{verdict.repaired} faults were repaired")
    dirty = "; it says that it was not closed properly" if verdict.is_dirty else ""
    print(f"{printable(verdict.image)}: {verdict.errors} errors, {verdict.leaks} leaks{dirty}")
    return verdict.status


def commit(arguments: argparse.Namespace) -> int:
    """Commit an image. Raises: ConfigError, DriverError, RequestFailed."""
    from xenbackend.cli.image_progress import watched
    from xenbackend.image.commit import commit as write_down
    from xenbackend.image.names import find_image

    image, into = find_image(arguments.image), find_image(arguments.into) if arguments.into else None
    try:
        with watched("commit", quiet=arguments.json) as progress:
            done = write_down(image, progress, into=into, direct=arguments.direct)
    except KeyboardInterrupt:
        print(f"stopped; {printable(image.path)} reads as before, and commit can be done again", file=sys.stderr)
        raise
    if arguments.json:
        _print_json({"image": image.text, **asdict(done)})
    else:
        wrote = format_size(done.written)
        print(f"{printable(done.parent)} now holds what {printable(image.path)} does ({wrote}); that may be removed")
    return 0


def resize(arguments: argparse.Namespace) -> int:
    """Make a disk larger. Raises: ConfigError, DriverError."""
    from xenbackend.image.names import find_image
    from xenbackend.image.resize import resize as grow

    image = find_image(arguments.image)
    before = grow(image, arguments.size)
    if arguments.json:
        _print_json({"image": image.text, "before": before, "size": arguments.size})
    else:
        print(f"{printable(image.text)}: {format_size(before)} before, {format_size(arguments.size)} now")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Convert a chain into a new image. Raises: ConfigError, ChainError, DriverError, RequestFailed."""
    from xenbackend.cli.image_progress import watched
    from xenbackend.image import convert as conversions
    from xenbackend.image.names import find_image
    from xenbackend.image.session import RequestFailed

    source, target = _chain(arguments.source), find_image(arguments.target)
    try:
        with watched("convert", quiet=arguments.quiet or arguments.json) as progress:
            direct = arguments.direct
            if arguments.overwrite:
                done = conversions.overwrite(source, target, progress, direct=direct)
            else:
                wishes, resume = _wishes(arguments), arguments.resume
                done = conversions.convert(source, target, wishes, progress, resume=resume, direct=direct)
    except (KeyboardInterrupt, RequestFailed):
        goes_on = f"the same with --resume goes on with {printable(target.path)}.partial"
        print(f"stopped; {'it has to be done again' if arguments.overwrite else goes_on}", file=sys.stderr)
        raise
    if arguments.json:
        _print_json({"source": source.text, "target": target.text, **asdict(done)})
    else:
        went_on = f", gone on at {format_size(done.resumed_at)}" if done.resumed_at else ""
        print(f"{printable(target.text)}: {format_size(done.size)}, {format_size(done.written)} written{went_on}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare two chains; the status is 0 or 1. Raises: ChainError, ConfigError, DriverError: not known, status 2."""
    from xenbackend.cli.image_progress import watched
    from xenbackend.image.compare import compare as look
    from xenbackend.image.session import RequestFailed

    first, second = _chain(arguments.first), _chain(arguments.second)
    try:
        with watched("compare", quiet=arguments.quiet or arguments.json) as progress:
            found = look(first, second, progress, direct=arguments.direct)
    except (RequestFailed, OSError) as error:
        raise DriverError(str(error)) from error
    is_same = found.is_same(strict=arguments.strict)
    if arguments.json:
        _print_json({**asdict(found), "is_same": is_same})
    elif not arguments.quiet:
        _print_compared(found, is_same=is_same)
    return 0 if is_same else 1


def _print_compared(found: Compared, *, is_same: bool) -> None:
    one, other = found.sizes
    if one != other:
        print(f"they have {format_size(one)} and {format_size(other)} ({one} and {other} bytes)")
    if found.differs_at is not None:
        print(f"they differ from byte {found.differs_at} on")
    elif is_same:
        print("they read the same")


def measure(arguments: argparse.Namespace) -> int:
    """Say how large an image would be. Raises: ChainError, ConfigError, DriverError."""
    from xenbackend.image.measure import measure as look

    source = arguments.size if arguments.source is None else _chain(arguments.source)
    found = look(arguments.format, source, _wishes(arguments))
    if arguments.json:
        _print_json(asdict(found))
    else:
        print(f"{format_size(found.required)} needed ({found.required} bytes)")
        print(f"{format_size(found.fully_allocated)} when it is full ({found.fully_allocated} bytes)")
    return 0


def rebase(arguments: argparse.Namespace) -> int:
    """Give an image another parent. Raises: ConfigError, DriverError, RequestFailed."""
    from xenbackend.cli.image_progress import watched
    from xenbackend.image.names import find_image
    from xenbackend.image.rebase import rebase as give

    image, parent = find_image(arguments.image), _parent(arguments)
    try:
        with watched("rebase", quiet=arguments.quiet or arguments.json) as progress:
            done = give(image, parent, progress, is_unsafe=arguments.unsafe, direct=arguments.direct)
    except KeyboardInterrupt:
        print(f"stopped; {printable(image.path)} has its former parent, and rebase can be done again", file=sys.stderr)
        raise
    if arguments.json:
        _print_json(asdict(done))
    else:
        of = f"a child of {printable(done.parent)}" if done.parent else "without a parent"
        print(f"{printable(done.text)}: {of}; {format_size(done.written)} written")
    return 0


def _chain(text: str) -> ChainSpec:
    """Return a chain; of a file without its format, say what to write. Raises: ChainError, ConfigError."""
    from xenbackend.block.spec import parse_chain
    from xenbackend.image.names import find_image, has_driver

    return parse_chain(text) if has_driver(text) else find_image(text).chain


def _parent(arguments: argparse.Namespace) -> Image | None:
    from xenbackend.image.names import image_of_file

    if arguments.parent is None:
        return None
    if arguments.parent_format is None:
        problem = f"{arguments.parent} may be of any format, and that is never guessed"
        raise ConfigError(f"{problem}; say --parent-format {', '.join(_FORMATS)}")
    return image_of_file(arguments.parent_format, arguments.parent)


def _wishes(arguments: argparse.Namespace) -> Wishes:
    from xenbackend.block.formats.blank import Wishes

    return Wishes(arguments.cluster_size, is_fixed=arguments.fixed)


def _print_created(made: Created, *, as_json: bool) -> int:
    if as_json:
        _print_json(asdict(made))
        return 0
    of = f", a child of {printable(made.parent)}" if made.parent else ""
    print(f"{printable(made.text)}: {format_size(made.size)}{of}")
    return 0


def _print_json(value: object) -> None:
    import json  # late: people do not read it

    print(json.dumps(value, indent=2))
