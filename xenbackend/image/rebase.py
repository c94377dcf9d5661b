"""Rebasing: an image gets another parent, or none, and reads as before.

Must not write to a parent, nor change what the image reads as unless that was asked for. It can be stopped anywhere and
done again: what is written first is what the image reads as anyway, and its header names the new parent last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from xenbackend.block.driver import File
from xenbackend.block.drivers.vhd import is_device
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.formats import qcow2, vhd
from xenbackend.block.formats.blank import Parent, qcow_name, vhd_with_parent
from xenbackend.block.formats.qcow2_repair import Write
from xenbackend.block.leaf import child_of
from xenbackend.block.opening import Identity, identity
from xenbackend.block.options import files_of
from xenbackend.block.qcow.datafile import data_item
from xenbackend.block.request import Op
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image.check import STEP, refuse_unchosen_data, write_plan
from xenbackend.image.extents import extents_of, map_chain
from xenbackend.image.names import Image, image_of_file
from xenbackend.image.pairs import read_pairs, where_either
from xenbackend.image.session import Disk, Progress, Session, flush_request, request_for
from xenbackend.image.transfer import grain_runs
from xenbackend.units import PAGE, round_up


@dataclass(frozen=True, slots=True)
class Rebased:
    """The layer that opens the image now, its parent, and how many bytes of what the former one had it was given."""

    text: str
    parent: str
    written: int


def rebase(
    image: Image, parent: Image | None, progress: Progress, *, is_unsafe: bool = False, direct: bool = False
) -> Rebased:
    """Give an image another parent.

    Args:
        image: is written, so that nobody else may have it open.
        parent: is only read; None for an image that is to stand by itself.
        progress: told of what was looked at.
        is_unsafe: change the name only, also where the former parent is missing: the image reads as the new one does
            wherever it has nothing itself.
        direct: bypass the page cache where the files allow it.

    Raises: ConfigError, where that cannot be; DriverError, where a file is in use or damaged, or the data are in one
        that only the image names; RequestFailed; OSError.
    """
    if image.format not in _KINDS:
        raise ConfigError(f"{image.text} cannot be given another parent; only {' and '.join(_KINDS)} images can")
    with Session(direct=direct) as session:
        new = session.open(parent.chain, read_only=True) if parent else None
        named, text = _named(image, new)
        files = _files_of(new)
        kind = _KINDS[image.format]
        try:
            file: File = session.open_file(image.path, read_only=True, step=512)
            kind.check(image, file, named, is_unsafe=is_unsafe)
            session.close(file)
            child = None if is_unsafe else session.open(image.chain, read_only=False)
            if child is None:
                file = session.open_file(image.path, read_only=False, step=STEP[image.format])
            else:
                file = child.chain.layers[0].driver.file  # type: ignore[attr-defined]  # each of these has one
            kind.check(image, file, named, is_unsafe=is_unsafe)  # nobody else writes to it from here on
            written = _keep_content(session, child, new, progress) if child else 0
            if _files_of(new) != files:
                problem = "its new parent, or one of that one's, was exchanged or moved meanwhile"
                raise DriverError(f"{problem}; it has its former parent still, and this can be done again")
            kind.name(file, named)
        except DriverError as error:
            error.layer = error.layer or image.text
            raise
        return Rebased(_with_data_file(image, text), parent.text if parent else "", written)


def _named(image: Image, new: Disk | None) -> tuple[Parent | None, str]:
    if new is None:
        return None, image_of_file(image.format, image.path).text
    layers = new.chain.layers
    if identity(image.path) in _files_of(new).values():
        raise ConfigError(f"{printable(layers[0].text)} is {printable(image.path)} itself, or one of its children")
    return child_of(layers, image.path, image.format)


def _files_of(new: Disk | None) -> dict[str, Identity | None]:
    """Return which files a parent and its own parents are in, by name: one may get another's name while we read it."""
    paths = {path for each in (new.chain.layers if new else ()) for path in files_of(each.driver.options).values()}
    return {path: identity(path) if os.path.exists(path) else None for path in paths}  # noqa: PTH110 - as `opening`


def _with_data_file(image: Image, text: str) -> str:
    """Return the layer with the external data file that the image's own names, if it does."""
    return f"{text},{data_item(image.data_file)}" if image.data_file else text


def _keep_content(session: Session, child: Disk, new: Disk | None, progress: Progress) -> int:
    """Write to the image what it has from its former parents and would not have from the new one; return the bytes."""
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
    """Yield the ranges that are in both."""
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


class _Kind(Protocol):
    """How a format names the parent of an image."""

    @staticmethod
    def check(image: Image, file: File, parent: Parent | None, *, is_unsafe: bool) -> None:
        """Refuse what cannot be, before anything is written. Raises: ConfigError, DriverError."""

    @staticmethod
    def name(file: File, parent: Parent | None) -> None:
        """Write the name, so that whoever is killed leaves the former parent or the new one. Raises: OSError."""


class _Qcow2:
    @staticmethod
    def check(image: Image, file: File, parent: Parent | None, *, is_unsafe: bool) -> None:
        _Qcow2._writes(file, parent)
        header = qcow2.parse_header(file.read_at, file.size)
        if parent and header.autoclear & qcow2.RAW_DATA:
            problem = "its external data file is a raw disk by itself, which has no parent"
            raise ConfigError(f"{image.text}: {problem}; convert it to an image without, or make a child of it")
        if header.snapshot_count and not is_unsafe:
            problem = "it has internal snapshots, which have the former parent and would read as the new one does"
            raise ConfigError(f"{image.text}: {problem}; delete them by qemu-img snapshot -d, or say --unsafe")
        refuse_unchosen_data(image, file)

    @staticmethod
    def name(file: File, parent: Parent | None) -> None:
        header = qcow2.parse_header(file.read_at, file.size)
        if header.autoclear != header.kept_autoclear:
            write_plan(file, [[qcow2.autoclear_bytes(header.kept_autoclear)]])  # bitmaps know nothing of another parent
        write_plan(file, [[write] for write in _Qcow2._writes(file, parent)])

    @staticmethod
    def _writes(file: File, parent: Parent | None) -> list[Write]:
        header = qcow2.parse_header(file.read_at, file.size)
        return qcow2.with_parent(file.read_at, header, qcow_name(parent), parent.qemu_format if parent else "")


class _Vhd:
    @staticmethod
    def check(image: Image, file: File, parent: Parent | None, *, is_unsafe: bool) -> None:  # noqa: ARG004
        footer, _ = vhd.read_footer(file.read_at, file.size)
        if footer.type == vhd.FIXED:
            raise ConfigError(f"{image.text} is fixed: it has all of its disk itself, and can have no parent")
        if is_device(image.path):
            raise ConfigError(f"{image.text} is on a block device, where no VHD gets another parent; convert it")
        vhd_with_parent(vhd.read_header(file.read_at, footer, file.size), 0, parent)

    @staticmethod
    def name(file: File, parent: Parent | None) -> None:
        """Put another header behind everything, then let the footers point there: each is one sector, and valid."""
        footer, _ = vhd.read_footer(file.read_at, file.size)
        header = vhd.read_header(file.read_at, footer, file.size)
        place = round_up(file.size, PAGE)
        moved, names = vhd_with_parent(header, place + vhd.HEADER_SIZE, parent)
        kind = vhd.DIFFERENCING if parent else vhd.DYNAMIC
        pointing = vhd.pack_footer(replace(footer, type=kind, data_offset=place))
        data = vhd.pack_header(moved) + names
        file.grow(round_up(place + len(data) + vhd.SECTOR, PAGE), vhd.pack_footer(footer))
        write_plan(file, [[(place, data)], [(file.size - vhd.SECTOR, pointing)], [(0, pointing)]])


_KINDS: dict[str, type[_Kind]] = {"vhd": _Vhd, "qcow2": _Qcow2}
