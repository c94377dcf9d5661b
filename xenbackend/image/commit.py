"""Commits an image: its own data are written to its parent, which then reads as the image does.

Must not write to the image. A commit can be stopped at any time and done again: the image on top of its parent always
reads as before, since only data that the image itself has are written to the parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xenbackend.block.extents import Extent, Kind
from xenbackend.block.formats.table import format_of
from xenbackend.block.opening import OpenLayer
from xenbackend.block.options import files_of
from xenbackend.block.qcow.datafile import data_item, unchosen
from xenbackend.block.spec import ChainSpec, parse_chain
from xenbackend.errors import ConfigError
from xenbackend.image.extents import extents_of
from xenbackend.image.names import Image
from xenbackend.image.session import Progress, Session
from xenbackend.image.transfer import Piece, Transfer, pieces_of
from xenbackend.opener.local import identity_of
from xenbackend.units import format_size


@dataclass(frozen=True, slots=True)
class Committed:
    """The parent as a layer, and how many bytes were written to it."""

    parent: str
    written: int


def commit(image: Image, progress: Progress, *, into: Image | None = None, direct: bool = False) -> Committed:
    """Write an image's own data to its parent. An exception from `progress` stops it.

    Args:
        image: is only read.
        progress: is told how many bytes are done.
        into: the parent as the operator opens it, which is required if the parent has an external data file.
        direct: bypass the page cache if the files allow it.

    Raises: ConfigError if there is no parent, the parent is smaller, or `into` is missing or another image;
        DriverError if either image is in use; RequestFailed if one cannot be read or written.
    """
    # The image is locked against writers, and the parent against everybody. The chain of both opens the parent once
    # more, and so must do without locks: it is only read where the image itself has data, and nobody writes there.
    with Session(direct=direct) as session:
        session.open_file(image.path, read_only=True, step=512)
        child = session.open(image.chain, read_only=True, locked=False)
        layers = child.chain.layers
        for path in set(files_of(layers[0].driver.options).values()) - {image.path}:  # its data file
            session.open_file(path, read_only=True, step=512)
        if len(layers) < 2:
            raise ConfigError(f"{image.text} has no parent to commit to")
        parent = _parent(layers[1], into)
        target = session.open(parent, read_only=False)
        if target.size < child.size:
            problem = f"its disk has {format_size(child.size)}, and its parent's only {format_size(target.size)}"
            raise ConfigError(f"{problem}; make the parent larger first, by image resize")
        own = [extent for extent in extents_of(layers[0], all_holes=True) if extent.kind is not Kind.ABSENT]
        transfer = Transfer(session, child, target, is_blank=False)
        _run(transfer, own, progress)
        return Committed(parent.text, transfer.written)


def _parent(found: OpenLayer, into: Image | None) -> ChainSpec:
    """Return the parent of an image as a chain to write to. If it has an external data file, `into` must name that.

    Raises: ConfigError.
    """
    data_file = getattr(found.driver.options, "data_file", "")
    text = f"{found.text},{data_item(data_file)}" if data_file else found.text
    if into is None:
        if data_file:
            raise ConfigError(f"{found.text}: {unchosen(data_file, f'--into {text}')}")
        return parse_chain(text)
    named, wanted = into.chain.layers[0].options, found.driver.options
    if into.format != format_of(found.driver.name) or _identities(named) != _identities(wanted):
        raise ConfigError(f"{into.text} is not its parent, or lacks the parent's data file; the parent is {text}")
    return into.chain


def _identities(options: Any) -> set[str | None]:
    """Return the identities of the files that options name; None for a missing file."""
    return {identity_of(path) for path in files_of(options).values()}


def _run(transfer: Transfer, own: Sequence[Extent], progress: Progress) -> None:
    done, total = 0, sum(extent.length for extent in own)

    def tell(piece: Piece) -> None:
        nonlocal done
        done += piece.length
        progress(done, total)

    progress(0, total)
    try:
        transfer.run(pieces_of(own), tell)
    finally:
        transfer.flush()
