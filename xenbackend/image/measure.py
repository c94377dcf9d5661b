"""Computes how much room a new image will take.

Must not write, nor read more than the tables of a source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xenbackend.block.extents import Extent
from xenbackend.block.formats.blank import Wishes, blank
from xenbackend.block.formats.table import FORMATS
from xenbackend.block.spec import ChainSpec
from xenbackend.image.extents import map_chain
from xenbackend.image.session import Session
from xenbackend.image.tools import tools_of


@dataclass(frozen=True, slots=True)
class Measured:
    """Sizes of a file in bytes: for the present data, and for a disk that is full."""

    required: int
    fully_allocated: int


def measure(image_format: str, source: ChainSpec | int, wishes: Wishes) -> Measured:
    """Return upper limits for the size of a new image's file, without a hole at its end, which takes no room.

    Args:
        image_format: one of WRITTEN.
        source: the chain to convert, or the size of an empty disk in bytes.
        wishes: as for `convert`.

    Raises: ConfigError if such an image is impossible; DriverError if the source cannot be opened.
    """
    if isinstance(source, int):
        return _measure(image_format, source, [], wishes)
    with Session() as session:
        disk = session.open(source, read_only=True)
        return _measure(image_format, disk.size, map_chain(disk.chain.layers, all_holes=True), wishes)


def _measure(image_format: str, size: int, extents: Iterable[Extent], wishes: Wishes) -> Measured:
    empty = blank(image_format, size, wishes, None)  # refuses impossible images
    cluster = wishes.cluster_size or FORMATS[image_format].cluster_size
    if not cluster or wishes.is_fixed:
        return Measured(empty.size, empty.size)
    used, most = _clusters(extents, cluster), -(-size // cluster)
    return Measured(*tools_of(image_format).measure(empty, cluster, used, most))


def _clusters(extents: Iterable[Extent], cluster: int) -> int:
    """Return how many clusters have data."""
    count, counted = 0, 0  # clusters before number `counted` have been counted
    for extent in extents:
        if not extent.is_zeros:
            first, end = max(counted, extent.start // cluster), -(-extent.end // cluster)
            count += max(0, end - first)
            counted = max(counted, end)
    return count
