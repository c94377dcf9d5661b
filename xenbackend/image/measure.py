"""How much room a new image takes, before it is made.

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
    """Bytes of a file: for what there is by now, and for a disk that is full."""

    required: int
    fully_allocated: int


def measure(image_format: str, source: ChainSpec | int, wishes: Wishes) -> Measured:
    """Return how large a new image's file becomes at most; a hole at the end, which takes no room, is left out.

    Args:
        image_format: one of WRITTEN.
        source: what it is made of, or the bytes of an empty disk.
        wishes: as for `convert`.

    Raises: ConfigError, where there can be no such image; DriverError, where the source cannot be opened.
    """
    if isinstance(source, int):
        return _measure(image_format, source, [], wishes)
    with Session() as session:
        disk = session.open(source, read_only=True)
        return _measure(image_format, disk.size, map_chain(disk.chain.layers, all_holes=True), wishes)


def _measure(image_format: str, size: int, extents: Iterable[Extent], wishes: Wishes) -> Measured:
    empty = blank(image_format, size, wishes, None)  # refuses what cannot be
    cluster = wishes.cluster_size or FORMATS[image_format].cluster_size
    if not cluster or wishes.is_fixed:
        return Measured(empty.size, empty.size)
    used, most = _clusters(extents, cluster), -(-size // cluster)
    return Measured(*tools_of(image_format).measure(empty, cluster, used, most))


def _clusters(extents: Iterable[Extent], cluster: int) -> int:
    """Return in how many clusters there is something."""
    count, counted = 0, 0  # all before `counted` are
    for extent in extents:
        if not extent.is_zeros:
            first, end = max(counted, extent.start // cluster), -(-extent.end // cluster)
            count += max(0, end - first)
            counted = max(counted, end)
    return count
