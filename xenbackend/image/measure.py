"""How much room a new image takes, before it is made.

Must not write, nor read more than the tables of a source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xenbackend.block.extents import Extent
from xenbackend.block.formats.blank import CLUSTER_SIZES, REFCOUNT_ORDER, Wishes, blank, qcow_l2_bits
from xenbackend.block.formats.qcow2_tables import refcount_clusters
from xenbackend.block.formats.vhd import SECTOR
from xenbackend.block.spec import ChainSpec
from xenbackend.image.check import STEP
from xenbackend.image.extents import map_chain
from xenbackend.image.session import Session
from xenbackend.units import PAGE, round_up


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of a file: for what there is by now, and for a disk that is full."""

    required: int
    fully_allocated: int


def measure(image_format: str, source: ChainSpec | int, wishes: Wishes) -> Measured:
    """Return how large a new image's file becomes at most; a hole at the end, which takes no room, is left out.

    Args:
        image_format: a key of `FORMATS`.
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
    if image_format == "raw" or wishes.is_fixed:
        return Measured(empty.size, empty.size)
    cluster = wishes.cluster_size or CLUSTER_SIZES[image_format]
    used, most = _clusters(extents, cluster), -(-size // cluster)
    if image_format == "qcow2":
        full = _full_qcow2(most, cluster)
        return Measured(full - (most - used) * cluster, full)
    if image_format == "qcow":
        table = 8 << qcow_l2_bits(cluster)  # bytes
        tables = -(-most // (table // 8))
        front = round_up(empty.size, STEP["qcow"]) + tables * round_up(table, cluster)
        return Measured(*(round_up(front + n * cluster, STEP["qcow"]) for n in (used, most)))
    bitmap = round_up(cluster // SECTOR // 8, SECTOR)
    stride = round_up(bitmap, PAGE) + cluster + PAGE  # blocks begin at pages, and a footer may have been between them
    return Measured(*(empty.size + n * stride for n in (used, most)))


def _clusters(extents: Iterable[Extent], cluster: int) -> int:
    """Return in how many clusters there is something."""
    count, counted = 0, 0  # all before `counted` are
    for extent in extents:
        if not extent.is_zeros:
            first, end = max(counted, extent.start // cluster), -(-extent.end // cluster)
            count += max(0, end - first)
            counted = max(counted, end)
    return count


def _full_qcow2(clusters: int, cluster: int) -> int:
    """Return the bytes of an image all of whose clusters are there, as QEMU's `qcow2_calc_prealloc_size` has it."""
    per_table = cluster // 8
    l2_tables = -(-clusters // per_table)
    l1_clusters = -(-l2_tables // per_table)
    used = 1 + clusters + l2_tables + l1_clusters
    return (used + sum(refcount_clusters(used, cluster, REFCOUNT_ORDER))) * cluster
