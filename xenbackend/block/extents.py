"""Ranges of a disk and what an image has of each: the words in which a driver answers `Driver.extents`.

Must not read an image's data or tables: what there is to know of entries is handed in, and a file is only asked where
its holes are. The order is that of the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from xenbackend.block.mapped.tables import PLACE, READABLE, SPECIAL


class Kind(Enum):
    """What an image has of a range."""

    DATA = "data"
    ZERO = "zero"  # it says that there are zeros
    ABSENT = "absent"  # the parent's, or zeros


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a disk in bytes. `depth` 0 is the image itself, 1 its parent; `place` is where in that file it is.

    `is_hole`: the image has room for data there, and its file has a hole, which reads as zeros.
    """

    start: int
    length: int
    kind: Kind
    place: int | None = None  # not known, or compressed
    depth: int = 0
    is_hole: bool = False

    @property
    def end(self) -> int:
        """Where it ends, in bytes."""
        return self.start + self.length

    @property
    def is_zeros(self) -> bool:
        """Whether it is known to read as zeros where no parent has anything else."""
        return self.is_hole or self.kind is not Kind.DATA


class Holed(Protocol):
    """What can be asked of a file; a part of `block.driver.File`."""

    size: int  # bytes

    def next_data(self, offset: int) -> tuple[int, int]:
        """Return where the first data at or behind `offset` begin and end; the size twice where there are none."""


def of_file(file: Holed, size: int) -> Iterator[Extent]:
    """Yield the ranges of a disk that its file begins with: its holes are zeros. Raises: OSError."""
    place = 0
    while place < size:
        start, end = (min(size, each) for each in file.next_data(place))
        if start > place:
            yield Extent(place, start - place, Kind.ZERO, place)
        if end > start:
            yield Extent(start, end - start, Kind.DATA, start)
        place = end


def with_holes(extents: Iterable[Extent], file: Holed) -> Iterator[Extent]:
    """Yield extents with their data cut where the file has holes. Raises: OSError."""
    start = end = 0  # data that the file has: what the last question brought
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
    """Yield what a table says, whose first entry stands for `start` on, up to `end` of the disk.

    Args:
        entries: as `block.mapped.tables` has them.
        cluster: bytes of the disk that each stands for.
        start: bytes.
        end: bytes.
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
    """Yield extents, those as one that follow one another and are alike."""
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
    """Yield first index, count and first entry of those that are alike and follow one another in the file."""
    if not entries:
        return
    first, expected = 0, entries[0]
    for index, entry in enumerate(entries):
        if entry != expected:
            yield first, index - first, entries[first]
            first = index
        expected = entry + cluster if entry & PLACE else entry
    yield first, len(entries) - first, entries[first]
