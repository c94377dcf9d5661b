"""Committing: what an image has itself goes into its parent, which then reads as the image does.

Must not write to the image. It can be stopped anywhere and done again: until the end the image on top of its parent
reads as before, since what is written to the parent is what the image has.
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
    """Where it went, as a layer, and how many bytes were written there."""

    parent: str
    written: int


def commit(image: Image, progress: Progress, *, into: Image | None = None, direct: bool = False) -> Committed:
    """Write what an image has to its parent. Whatever `progress` raises stops it between two turns.

    Args:
        image: is only read.
        progress: told of what was written.
        into: the parent as the operator opens it, which one that has an external data file needs.
        direct: bypass the page cache where the files allow it.

    Raises: ConfigError, where there is no parent, one that is smaller, or `into` is another one or missing;
        DriverError, where either is in use; RequestFailed, where one cannot be read or written.
    """
    # The image is locked against writers, and the parent against everybody. So the chain of both, which opens the
    # parent once more, goes without locks: it is read where the image itself has data, and nobody writes there.
    with Session(direct=direct) as session:
        session.open_file(image.path, read_only=True, step=512)
        child = session.open(image.chain, read_only=True, locked=False)
        layers = child.chain.layers
        for path in set(files_of(layers[0].driver.options).values()) - {image.path}:  # its data file
            session.open_file(path, read_only=True, step=512)
        if len(layers) < 2:
            raise ConfigError(f"{image.text} has no parent that it could be committed to")
        parent = _parent(layers[1], into)
        target = session.open(parent, read_only=False)
        if target.size < child.size:
            problem = f"its parent has {format_size(target.size)}, and it {format_size(child.size)}"
            raise ConfigError(f"{problem}; make the parent larger first, by image resize")
        own = [extent for extent in extents_of(layers[0], all_holes=True) if extent.kind is not Kind.ABSENT]
        transfer = Transfer(session, child, target, is_blank=False)
        _run(transfer, own, progress)
        return Committed(parent.text, transfer.written)


def _parent(found: OpenLayer, into: Image | None) -> ChainSpec:
    """Return the parent that an image has, as it may be written: where its data are is for the operator to say."""
    data_file = getattr(found.driver.options, "data_file", "")
    text = f"{found.text},{data_item(data_file)}" if data_file else found.text
    if into is None:
        if data_file:
            raise ConfigError(f"{found.text}: {unchosen(data_file, f'--into {text}')}")
        return parse_chain(text)
    named, wanted = into.chain.layers[0].options, found.driver.options
    if into.format != format_of(found.driver.name) or _identities(named) != _identities(wanted):
        raise ConfigError(f"{into.text} is not its parent, or is without the parent's data file; that is {text}")
    return into.chain


def _identities(options: Any) -> set[str | None]:
    """Return what tells the files apart that options name; None for one that is not there."""
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
