"""Ranges of a disk, and what an image has of each: the results of `Driver.extents`.

Must not read an image's data or tables: entries are passed in, and a file is only asked for its holes. All ranges are
in the order of the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from xenbackend.block.mapped.tables import PLACE, READABLE, SPECIAL


class Kind(Enum):
    """The state of a range in an image."""

    DATA = "data"
    ZERO = "zero"  # the image says that it reads as zeros
    ABSENT = "absent"  # not in the image: the parent's data, or zeros


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a disk, in bytes. `depth` is 0 for the image itself, 1 for its parent; `place` is that in the file.

    `is_hole`: the image has a place for these data, at which its file has a hole, which reads as zeros.
    """

    start: int
    length: int
    kind: Kind
    place: int | None = None  # None: not known, or compressed
    depth: int = 0
    is_hole: bool = False

    @property
    def end(self) -> int:
        """The end of the range, in bytes, which is excluded."""
        return self.start + self.length

    @property
    def is_zeros(self) -> bool:
        """Whether it is known to read as zeros, unless a parent has data there."""
        return self.is_hole or self.kind is not Kind.DATA


class HasHoles(Protocol):
    """A file that knows its holes; a part of `block.driver.File`."""

    size: int  # bytes

    def next_data(self, offset: int) -> tuple[int, int]:
        """Return where the first data at or after `offset` begin and end; the size twice if there are none."""


def of_file(file: HasHoles, size: int) -> Iterator[Extent]:
    """Yield the extents of a raw disk, which is the beginning of its file: holes are zeros. Raises: OSError."""
    place = 0
    while place < size:
        start, end = (min(size, each) for each in file.next_data(place))
        if start > place:
            yield Extent(place, start - place, Kind.ZERO, place)
        if end > start:
            yield Extent(start, end - start, Kind.DATA, start)
        place = end


def with_holes(extents: Iterable[Extent], file: HasHoles) -> Iterator[Extent]:
    """Yield extents, with data split where the file has holes. Raises: OSError."""
    start = end = 0  # the range of data that the file has reported last
    asked = 0
    for extent in extents:
        if extent.kind is not Kind.DATA or extent.place is None:
            yield extent
            continue
        place, stop = extent.place, extent.place + extent.length
        while place < stop:
            if not asked <= place < end:
                asked = place
                start, end = file.next_data(place) if place < file.size else (stop, stop)
            is_hole = place < start
            until = min(stop, start if is_hole else end)
            yield replace(cut(extent, extent.start + place - extent.place, until - place), is_hole=is_hole)
            place = until


def of_entries(entries: Sequence[int], cluster: int, start: int, end: int) -> Iterator[Extent]:
    """Yield the extents that a table describes.

    Args:
        entries: as in `block.mapped.tables`.
        cluster: bytes of the disk for each entry.
        start: where the first entry's cluster begins on the disk, in bytes.
        end: where to stop on the disk, in bytes.
    """
    if start < end and not any(entries):
        yield Extent(start, min(len(entries) * cluster, end - start), Kind.ABSENT)
        return
    for first, count, entry in _runs(entries[: -(-(end - start) // cluster)], cluster):
        place = start + first * cluster
        length = min(count * cluster, end - place)
        if entry & READABLE:
            yield Extent(place, length, Kind.DATA, entry & PLACE)
        elif entry & SPECIAL:
            yield Extent(place, length, Kind.DATA)
        else:
            yield Extent(place, length, Kind.ZERO if entry else Kind.ABSENT, entry & PLACE or None)


def cut(extent: Extent, start: int, length: int) -> Extent:
    """Return a part of an extent."""
    place = None if extent.place is None else extent.place + start - extent.start
    return replace(extent, start=start, length=length, place=place)


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield extents, with adjacent ones merged if they are alike and consecutive in the file."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and _continues(last, extent):
            last = replace(last, length=last.length + extent.length)
        else:
            if last is not None:
                yield last
            last = extent
    if last is not None:
        yield last


def _continues(last: Extent, extent: Extent) -> bool:
    if (last.kind, last.depth, last.is_hole) != (extent.kind, extent.depth, extent.is_hole):
        return False
    return extent.place == (None if last.place is None else last.place + last.length)


def _runs(entries: Sequence[int], cluster: int) -> Iterator[tuple[int, int, int]]:
    """Yield first index, count and first entry of runs of entries that are alike and consecutive in the file."""
    if not entries:
        return
    first, expected = 0, entries[0]
    for index, entry in enumerate(entries):
        if entry != expected:
            yield first, index - first, entries[first]
            first = index
        expected = entry + cluster if entry & PLACE else entry
    yield first, len(entries) - first, entries[first]
