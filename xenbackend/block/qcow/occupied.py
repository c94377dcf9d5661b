"""Which clusters of a QCOW2 image hold its own tables, and so must never be handed out, whatever the refcounts say.

Must not rely on refcounts: it is there in case they are wrong.

A refcount that is too low goes unnoticed until the cluster is handed out. If the cluster has data, only a check can
find it. If it has a table, a write would destroy everything that the table refers to.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from itertools import pairwise

from xenbackend.block.formats.common import Read, damaged
from xenbackend.block.formats.qcow2 import Header, Region
from xenbackend.block.formats.qcow2_tables import OFFSET, parse_bitmaps, parse_snapshots, unpack_table
from xenbackend.errors import DriverError

MAX_TABLES = 64 << 20  # bytes of tables of snapshots and bitmaps; the L1 table of a disk of 1 TiB has 16 KiB


class Occupied:
    """The clusters of the header and of all tables; a table that is shared by two counts twice.

    Args:
        cluster_bits: a cluster has 2 to the power of this many bytes.
        regions: the header, and tables of several clusters.
        tables: the places of L2 tables and refcount blocks, each of which is one cluster.
    """

    def __init__(self, cluster_bits: int, regions: Iterable[Region], tables: Iterable[int]) -> None:
        self._bits = cluster_bits
        self._regions = [self._span(region) for region in regions]
        self._tables = array("Q", sorted(place >> cluster_bits for place in tables if place))

    @property
    def has_overlaps(self) -> bool:
        """Whether a region overlaps another one, or an L2 table or a refcount block."""
        spans = sorted(self._regions)
        if any(start < stop for (_, stop), (start, _) in pairwise(spans)):
            return True
        places = (bisect_left(self._tables, start) for start, _ in spans)
        return any(
            at < len(self._tables) and self._tables[at] < stop for at, (_, stop) in zip(places, spans, strict=True)
        )

    def find(self, first: int, end: int) -> int | None:
        """Return the first cluster of `first` to `end` - 1 that holds a table, or None."""
        found = [max(first, start) for start, stop in self._regions if start < end and first < stop]
        at = bisect_left(self._tables, first)
        if at < len(self._tables) and self._tables[at] < end:
            found.append(self._tables[at])
        return min(found, default=None)

    def among(self, places: Iterable[int]) -> set[int]:
        """Return those of `places`, of clusters and in bytes, at which a table is."""
        clusters = {place >> self._bits for place in places}
        if not clusters:
            return set()
        low, high = min(clusters), max(clusters)
        at, to = bisect_left(self._tables, low), bisect_right(self._tables, high)
        found = clusters.intersection(self._tables[at:to])
        for start, stop in self._regions:
            if start <= high and low < stop:
                found |= clusters.intersection(range(start, stop))
        return {cluster << self._bits for cluster in found}

    def add_table(self, place: int) -> None:
        """Add a new L2 table or refcount block."""
        insort(self._tables, place >> self._bits)

    def remove_table(self, place: int) -> None:
        """Remove an L2 table or refcount block, or one of its users."""
        cluster = place >> self._bits
        at = bisect_left(self._tables, cluster)
        if at < len(self._tables) and self._tables[at] == cluster:
            del self._tables[at]

    def move(self, before: Region, after: Region) -> None:
        """Note that a region has moved."""
        self._regions.remove(self._span(before))
        self._regions.append(self._span(after))

    def _span(self, region: Region) -> tuple[int, int]:
        return region.offset >> self._bits, -(-(region.offset + region.length) >> self._bits)


def occupied_by(
    read: Read, file_size: int, header: Header, l1: Sequence[int], refcount_table: Sequence[int]
) -> Occupied:
    """Return the clusters of all tables of an image, including those of its snapshots and bitmaps.

    Args:
        read: reads the image file.
        file_size: the file's size in bytes.
        header: the image's header.
        l1: the words of its L1 table.
        refcount_table: the entries of its refcount table.

    Raises: DriverError, OSError.
    """
    regions = [Region(0, header.cluster_size), header.l1, header.refcount_table]
    blocks, active = [place for place in refcount_table if place], _places(l1)
    tables: list[int] = []  # L2 tables of snapshots, which may be shared among them and with the disk
    if header.snapshot_count:
        snapshots, l1_tables = parse_snapshots(read, header, file_size)
        regions += [snapshots, *l1_tables]
        _check_length(sum(region.length for region in set(l1_tables)))
        for region in set(l1_tables):
            tables += _places(unpack_table(read(region.offset, region.length))) * l1_tables.count(region)
    length = 0
    for region in parse_bitmaps(read, header, file_size):  # lazily: the length is checked before each is read
        length += region.length if region.length > header.cluster_size else 0
        _check_length(length)
        regions.append(region)
    alone = {*blocks, *active}
    if len(alone) < len(blocks) + len(active) or not set(blocks).isdisjoint(tables):
        raise _overlap()
    occupied = Occupied(header.cluster_bits, set(regions), [*blocks, *active, *tables])
    if occupied.has_overlaps:
        raise _overlap()
    return occupied


def _overlap() -> DriverError:
    return damaged("two of its tables overlap, so it can only be opened read-only")


def _check_length(length: int) -> None:
    """Refuse tables that would take too long to read; a sparse file can have huge ones. Raises: DriverError."""
    if length > MAX_TABLES:
        raise damaged(f"the tables of its snapshots or bitmaps have {length} bytes, more than {MAX_TABLES}")


def _places(l1: Iterable[int]) -> list[int]:
    return [place for word in l1 if (place := word & OFFSET)]
