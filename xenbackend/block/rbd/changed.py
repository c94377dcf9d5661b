"""Turns a cluster's ranges of an image, which are in bytes and in any order, into extents of whole sectors.

Must not report a sector as zeros or unchanged if it is so only in part: whoever copies would lose the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xenbackend.block.extents import Extent, Kind
from xenbackend.units import SECTOR, round_up


def extents_of(found: Iterable[tuple[int, int, bool]], start: int, end: int, gaps: Kind) -> Iterator[Extent]:
    """Yield the extents from `start` to `end`.

    Args:
        found: as returned by `ceph.image.Image.diff`: offset, length in bytes, and True for data or False for zeros.
        start: bytes, at the beginning of a sector.
        end: bytes, at the end of a sector or of the disk.
        gaps: the kind of the ranges in between. A sector that is not wholly of one kind is data.
    """
    edges: list[tuple[int, int, int]] = []  # place, change there in the number of data ranges, and of zero ranges
    for offset, length, is_data in found:
        first, last = max(start, offset), min(end, offset + length)
        if last <= first:
            continue
        inner, inner_end = round_up(first, SECTOR), last if last == end else last - last % SECTOR
        if is_data or inner >= inner_end:
            edges += _edges(first - first % SECTOR, min(end, round_up(last, SECTOR)), 1, 0)
            continue
        edges += _edges(inner, inner_end, 0, 1)
        if first < inner:
            edges += _edges(first - first % SECTOR, inner, 1, 0)
        if inner_end < last:
            edges += _edges(inner_end, min(end, round_up(last, SECTOR)), 1, 0)
    edges.sort()
    place, data, zeros = start, 0, 0
    for edge, more_data, more_zeros in [*edges, (end, 0, 0)]:
        if edge > place:
            yield Extent(place, edge - place, Kind.DATA if data else Kind.ZERO if zeros else gaps)
            place = edge
        data, zeros = data + more_data, zeros + more_zeros


def _edges(first: int, last: int, data: int, zeros: int) -> list[tuple[int, int, int]]:
    return [(first, data, zeros), (last, -data, -zeros)]
