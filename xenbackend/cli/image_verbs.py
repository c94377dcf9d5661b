"""`xenbackend image`: the verbs that make, copy and change images, or compare what they hold.

Must not do the work, which `xenbackend.image` does: each verb is one call, and prints a sentence or JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from xenbackend.block.formats.blank import Wishes
from xenbackend.block.formats.table import FORMATS, WRITTEN
from xenbackend.block.luks.blank import SECTOR_SIZES
from xenbackend.block.spec import ChainSpec
from xenbackend.cli import output
from xenbackend.cli.image_progress import watched
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image import commit as commits
from xenbackend.image import compare as comparisons
from xenbackend.image import convert as conversions
from xenbackend.image import create as creations
from xenbackend.image import measure as measures
from xenbackend.image import rebase as rebases
from xenbackend.image import remote as remotes
from xenbackend.image import resize as sizes
from xenbackend.image import trust as trusts
from xenbackend.image.compare import Compared
from xenbackend.image.create import Created
from xenbackend.image.names import Image, find_chain, find_image, image_of_file
from xenbackend.image.session import RequestFailed
from xenbackend.opener.parents import TRUSTED
from xenbackend.units import format_size


def create(arguments: argparse.Namespace) -> int:
    """Make an image. Raises: ConfigError, DriverError."""
    if arguments.encrypt is not None:
        return _create_encrypted(arguments)
    if arguments.sector_size is not None:
        raise ConfigError("--sector-size is for an encrypted volume; use it with --encrypt")
    made = creations.create(arguments.format, arguments.file, arguments.size, _wishes(arguments), _parent(arguments))
    return _print_created(made, as_json=arguments.json)


def _create_encrypted(arguments: argparse.Namespace) -> int:
    others = (arguments.parent, arguments.parent_format, arguments.cluster_size, arguments.fixed)
    if arguments.format != "raw" or any(others) or arguments.size is None:
        raise ConfigError(
            "--encrypt makes raw images of a SIZE, without a parent; for another format convert it: `xenbackend "
            "image convert aio:FILE qcow2:NEW`"
        )
    made = creations.create_encrypted(
        arguments.file, arguments.size, arguments.encrypt, arguments.sector_size or SECTOR_SIZES[-1]
    )
    return _print_created(made, as_json=arguments.json)


def snapshot(arguments: argparse.Namespace) -> int:
    """Make a child. Raises: ConfigError, DriverError."""
    return _print_created(creations.snapshot(find_image(arguments.image), arguments.new), as_json=arguments.json)


def commit(arguments: argparse.Namespace) -> int:
    """Commit an image. Raises: ConfigError, DriverError, RequestFailed."""
    image, into = find_image(arguments.image), find_image(arguments.into) if arguments.into else None
    try:
        with watched("commit", quiet=arguments.json) as progress:
            done = commits.commit(image, progress, into=into, direct=arguments.direct)
    except KeyboardInterrupt:
        print(f"stopped; {printable(image.path)} reads as before, and commit can be repeated", file=sys.stderr)
        raise
    if arguments.json:
        _print_json({"image": image.text, **asdict(done)})
    else:
        wrote = format_size(done.written)
        print(
            f"{printable(done.parent)} now holds what {printable(image.path)} does ({wrote}); {printable(image.path)} "
            "may be removed"
        )
    return 0


def resize(arguments: argparse.Namespace) -> int:
    """Make a disk larger. Raises: ConfigError, DriverError."""
    image = find_image(arguments.image)
    before = sizes.resize(image, arguments.size)
    if arguments.json:
        _print_json({"image": image.text, "before": before, "size": arguments.size})
    else:
        print(f"{printable(image.text)}: {format_size(before)} before, {format_size(arguments.size)} now")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Convert a chain into a new image. Raises: ConfigError, ChainError, DriverError, RequestFailed."""
    source, (chain, target) = find_chain(arguments.source), _find_target(arguments.target)
    wishes, direct = _wishes(arguments), arguments.direct
    if target is None and (arguments.resume or wishes != Wishes()):
        raise ConfigError(
            "a disk of a server or cluster has no such options, and a stopped conversion to it starts again"
        )
    goes_on = "it must be repeated"
    try:
        with watched("convert", quiet=arguments.quiet or arguments.json) as progress:
            if arguments.overwrite:
                done = conversions.overwrite(source, chain, progress, direct=direct)
            elif target is None:
                done = remotes.convert(source, chain, progress, direct=direct)
            else:
                goes_on = f"the same command with --resume continues {printable(target.path)}.partial"
                done = conversions.convert(source, target, wishes, progress, resume=arguments.resume, direct=direct)
    except (KeyboardInterrupt, RequestFailed):
        print(f"stopped; {goes_on}", file=sys.stderr)
        raise
    if arguments.json:
        _print_json({"source": source.text, "target": chain.text, **asdict(done)})
    else:
        went_on = f", continued at {format_size(done.resumed_at)}" if done.resumed_at else ""
        print(f"{printable(chain.text)}: {format_size(done.size)}, {format_size(done.written)} written{went_on}")
    return 0


def _find_target(text: str) -> tuple[ChainSpec, Image | None]:
    """Return the chain of a conversion's target, and its image; None if a server or cluster has it.

    Raises: ChainError, ConfigError.
    """
    remote = remotes.find_remote(text)
    if remote is not None:
        return remote, None
    image = find_image(text)
    return image.chain, image


def unlock(arguments: argparse.Namespace) -> int:
    """Take an image's lock from an owner that is dead. Raises: ChainError, ConfigError, DriverError."""
    chain = find_chain(arguments.image)
    owner = remotes.take_lock(chain, arguments.owner)
    if arguments.json:
        _print_json({"image": chain.text, "owner": owner})
    else:
        print(f"{printable(chain.text)}: the lock was taken from {printable(owner)}, which is kept out for a year")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare two chains; return status 0 or 1. Raises: ChainError, ConfigError, DriverError, for status 2."""
    first, second = find_chain(arguments.first), find_chain(arguments.second)
    try:
        with watched("compare", quiet=arguments.quiet or arguments.json) as progress:
            found = comparisons.compare(first, second, progress, direct=arguments.direct)
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
        print(f"the first difference is at byte {found.differs_at}")
    elif is_same:
        print("they read the same")


def measure(arguments: argparse.Namespace) -> int:
    """Print how large an image would be. Raises: ChainError, ConfigError, DriverError."""
    source = arguments.size if arguments.source is None else find_chain(arguments.source)
    found = measures.measure(arguments.format, source, _wishes(arguments))
    if arguments.json:
        _print_json(asdict(found))
    else:
        print(f"{format_size(found.required)} needed ({found.required} bytes)")
        print(f"{format_size(found.fully_allocated)} when it is full ({found.fully_allocated} bytes)")
    return 0


def rebase(arguments: argparse.Namespace) -> int:
    """Give an image another parent. Raises: ConfigError, DriverError, RequestFailed."""
    image, parent = find_image(arguments.image), _parent(arguments)
    try:
        with watched("rebase", quiet=arguments.quiet or arguments.json) as progress:
            done = rebases.rebase(image, parent, progress, is_unsafe=arguments.unsafe, direct=arguments.direct)
    except KeyboardInterrupt:
        print(f"stopped; {printable(image.path)} has its former parent, and rebase can be repeated", file=sys.stderr)
        raise
    if arguments.json:
        _print_json(asdict(done))
    else:
        of = f"a child of {printable(done.parent)}" if done.parent else "without a parent"
        print(f"{printable(done.text)}: {of}; {format_size(done.written)} written")
    return 0


def trust(arguments: argparse.Namespace) -> int:
    """Mark an image and its parents with what they name. Raises: ConfigError, DriverError."""
    image = find_image(arguments.image, tuple(FORMATS))
    marked = trusts.trust(image)
    if arguments.json:
        _print_json({"image": image.text, "marked": [asdict(each) for each in marked]})
        return 0
    for each in marked:
        before = "" if each.before == TRUSTED else f" (it was allowed by {each.before})"
        print(f"{printable(each.image)}: its {each.what} is {printable(each.file)}{printable(before)}")
    if not marked:
        print(f"{printable(image.text)} names no other file, so there is nothing to mark")
    return 0


def _parent(arguments: argparse.Namespace) -> Image | None:
    if arguments.parent is None:
        return None
    if arguments.parent_format is None:
        problem = f"{arguments.parent} may have any format, which is never guessed"
        raise ConfigError(f"{problem}; add --parent-format {', '.join(WRITTEN)}")
    return image_of_file(arguments.parent_format, arguments.parent)


def _wishes(arguments: argparse.Namespace) -> Wishes:
    return Wishes(arguments.cluster_size, is_fixed=arguments.fixed)


def _print_created(made: Created, *, as_json: bool) -> int:
    if as_json:
        _print_json(asdict(made))
        return 0
    of = f", a child of {printable(made.parent)}" if made.parent else ""
    print(f"{printable(made.text)}: {format_size(made.size)}{of}")
    return 0


def _print_json(value: dict[str, Any]) -> None:
    output.print_json(value, indent=2)
