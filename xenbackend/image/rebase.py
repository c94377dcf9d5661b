"""Rebases an image: it gets another parent, or none, and reads as before.

Must not write to a parent, nor change what the image reads as unless that was asked for. It can be stopped at any time
and done again: it first writes data that the image reads as anyway, and names the new parent in the header last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from xenbackend.block.driver import File
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.formats.blank import Parent
from xenbackend.block.formats.table import WRITTEN
from xenbackend.block.leaf import child_of
from xenbackend.block.options import files_of
from xenbackend.block.qcow.datafile import data_item
from xenbackend.block.request import Op
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image.extents import extents_of, map_chain
from xenbackend.image.names import Image, blame, image_of_file
from xenbackend.image.pairs import read_pairs, where_either
from xenbackend.image.session import Disk, Progress, Session, flush_request, request_for
from xenbackend.image.tools import tools_of
from xenbackend.image.transfer import grain_runs
from xenbackend.opener import marks
from xenbackend.opener.local import identity_of
from xenbackend.units import SECTOR


@dataclass(frozen=True, slots=True)
class Rebased:
    """The layer that opens the image now, its parent, and how many bytes were copied to it from its former parents."""

    text: str
    parent: str
    written: int


def rebase(
    image: Image, parent: Image | None, progress: Progress, *, is_unsafe: bool = False, direct: bool = False
) -> Rebased:
    """Give an image another parent.

    Args:
        image: is written, so nobody else may have it open.
        parent: is only read; None if the image shall have no parent.
        progress: is told how many bytes have been compared.
        is_unsafe: only change the name, even if the former parent is missing: where the image has no data of its own,
            it reads as the new parent does.
        direct: bypass the page cache if the files allow it.

    Raises: ConfigError if it is impossible; DriverError if a file is in use or damaged, or if the image's data are in a
        file that only the image itself names; RequestFailed; OSError.
    """
    if not image.row.can_rebase:
        able = " and ".join(each.name for each in WRITTEN.values() if each.can_rebase)
        raise ConfigError(f"{image.text} cannot be given another parent; only {able} images can")
    with Session(direct=direct) as session:
        new = session.open(parent.chain, read_only=True) if parent else None
        named, marked, unmarked = _named(image, new)
        files = _files_of(new)
        tools = tools_of(image.format)
        with blame(image):
            file: File = session.open_file(image.path, read_only=True, step=SECTOR)
            tools.check_parent(image, file, named, is_unsafe=is_unsafe)
            session.close(file)
            child = None if is_unsafe else session.open(image.chain, read_only=False)
            if child is None:
                file = session.open_file(image.path, read_only=False, step=image.row.step)
            else:
                file = child.chain.layers[0].driver.file  # type: ignore[attr-defined]  # all drivers of these formats have one
            tools.check_parent(image, file, named, is_unsafe=is_unsafe)  # again: nobody else writes to it from here on
            written = _keep_content(session, child, new, progress) if child else 0
            if _files_of(new) != files:
                problem = "its new parent, or one of that image's parents, was replaced or moved meanwhile"
                raise DriverError(f"{problem}; it still has its former parent, and rebase can be repeated")
            is_marked = _name_parent(session, image, file, named, new)
        text = marked if is_marked else unmarked
        return Rebased(_with_data_file(image, text), parent.text if parent else "", written)


def _name_parent(session: Session, image: Image, file: File, named: Parent | None, new: Disk | None) -> bool:
    """Name the new parent in the image, and mark the image with it. Return whether the image can be marked.

    The mark names both parents while the image is written, so that the image can be opened even if we are killed.
    """
    opener = session.opener
    fd, former = opener.descriptor(image.path), marks.read(opener.descriptor(image.path)).parents
    files = files_of(new.chain.layers[0].driver.options) if new else {}
    is_marked = opener.mark_child(fd, files, former) if files else True
    file.sync()
    tools_of(image.format).name_parent(file, named)
    if is_marked:
        marks.mark_parents(fd, [opener.describe(next(iter(files.values())))] if files else [])
    file.sync()
    return is_marked


def _named(image: Image, new: Disk | None) -> tuple[Parent | None, str, str]:
    if new is None:
        text = image_of_file(image.format, image.path).text
        return None, text, text
    layers = new.chain.layers
    if identity_of(image.path) in _files_of(new).values():
        raise ConfigError(f"{printable(layers[0].text)} is {printable(image.path)} itself, or one of its children")
    return child_of(layers, image.path, image.format)


def _files_of(new: Disk | None) -> dict[str, str | None]:
    """Return the files of a parent and of its parents: identities by name, as a name may get another file meanwhile."""
    paths = {path for each in (new.chain.layers if new else ()) for path in files_of(each.driver.options).values()}
    return {path: identity_of(path) for path in paths}


def _with_data_file(image: Image, text: str) -> str:
    """Return a layer's text with the external data file, if the layer of `image` names one."""
    return f"{text},{data_item(image.data_file)}" if image.data_file else text


def _keep_content(session: Session, child: Disk, new: Disk | None, progress: Progress) -> int:
    """Write to the image wherever its former parents' content differs from the new one's; return the bytes written."""
    own = [each for each in extents_of(child.chain.layers[0], all_holes=True) if each.kind is Kind.ABSENT]
    maps = [map_chain(disk.chain.layers, all_holes=True) if disk else iter(()) for disk in (child, new)]
    extents = list(_common(own, where_either(*maps)))  # the maps change with the first write
    total, done, written = sum(each.length for each in extents), 0, 0
    progress(0, total)
    for piece, mine, theirs in read_pairs(session, child, new, extents):
        runs = [] if bytes(mine) == bytes(theirs) else grain_runs(piece.length, partial(_is_different, mine, theirs))
        writes = [request_for(Op.WRITE, piece.offset + start, mine[start:end]) for start, end in runs]
        if writes:
            session.do(child, *writes)
            written += sum(each.length for each in writes)
        done += piece.length
        progress(done, total)
    session.do(child, flush_request())
    return written


def _common(one: Iterable[Extent], other: Iterable[Extent]) -> Iterator[Extent]:
    """Yield the ranges that are in both sequences."""
    others = iter(other)
    current = next(others, None)
    for extent in one:
        while current is not None and current.start < extent.end:
            start, end = max(extent.start, current.start), min(extent.end, current.end)
            if start < end:
                yield Extent(start, end - start, Kind.DATA)
            if current.end > extent.end:
                break
            current = next(others, None)


def _is_different(mine: memoryview, theirs: memoryview, start: int, end: int) -> bool:
    return bytes(mine[start:end]) != bytes(theirs[start:end])
