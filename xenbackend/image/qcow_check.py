"""Checks whether a QCOW image of version 1 is sound: each cluster is inside the file, and used only once.

Must not write: an image of this version has no redundant data from which it could be repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xenbackend.block.formats import qcow
from xenbackend.block.formats.common import Read
from xenbackend.block.formats.qcow2 import Region
from xenbackend.block.formats.qcow2_tables import unpack_table
from xenbackend.image.faults import Faults

_PADDING = 64 * 1024  # bytes: opening an image for writing first extends the file to a multiple of this


def check(read: Read, file_size: int) -> Faults:
    """Return what is wrong with an image. Raises: DriverError if it is not an image of this version; OSError."""
    header = qcow.parse_header(read, file_size)
    faults = Faults()
    _find_overlaps(_regions(read, file_size, header, faults), faults, header.cluster_size)
    return faults


def used_end(read: Read, file_size: int) -> int:
    """Return the offset where the last used range of a sound image ends. Raises: DriverError, OSError."""
    header = qcow.parse_header(read, file_size)
    regions = [region for _, region in _regions(read, file_size, header, Faults())]
    return max(region.offset + region.length for region in regions)


def _regions(read: Read, file_size: int, header: qcow.Header, faults: Faults) -> list[tuple[str, Region]]:
    """Return the tables and clusters of an image with their ranges; one outside the file is added to `faults`."""
    regions = [("the L1 table", header.l1)]
    inside = header.cluster_size - 1
    for number, place in enumerate(unpack_table(read(header.l1.offset, header.l1.length))):
        if not place:
            continue
        table = Region(place, 8 << header.l2_bits)
        if place & 511 or place + table.length > file_size:
            faults.add_error(f"L2 table {number} at byte {place} is not inside the file of {file_size}")
            continue
        regions.append((f"L2 table {number}", table))
        first = number << header.l2_bits
        for what, region in _clusters(unpack_table(read(place, table.length)), first, header):
            is_odd = region.offset & inside and not what.endswith("(compressed)")
            if is_odd or region.offset >= file_size or not region.offset:
                faults.add_error(f"{what} at byte {region.offset} is not inside the file of {file_size}")
            else:
                regions.append((what, region))
    return regions


def _clusters(entries: Iterable[int], first: int, header: qcow.Header) -> Iterator[tuple[str, Region]]:
    for number, entry in enumerate(entries, first):
        if entry & qcow.COMPRESSED:
            yield f"cluster {number} (compressed)", qcow.compressed_place(entry, header.cluster_bits)
        elif entry:
            yield f"cluster {number}", Region(entry, header.cluster_size)


def _find_overlaps(regions: list[tuple[str, Region]], faults: Faults, cluster_size: int) -> None:
    end, before, lost = 0, "", 0
    for what, region in sorted(regions, key=lambda each: each[1].offset):
        if region.offset < end:
            faults.add_error(f"{what} at byte {region.offset} overlaps {before}")
        elif before:
            gap = region.offset - end
            lost += gap // cluster_size if gap >= _PADDING else 0
        if region.offset + region.length > end:
            end, before = region.offset + region.length, what
    if lost:
        faults.add_leaks(
            lost, f"there is room for {lost} clusters that nothing uses; image convert makes an image without them"
        )
