"""Reading QCOW2 images with subclusters (extended L2 entries): a cluster has 32 parts, each with a state of its own.

A subcluster is data, zeros, or the parent's; `entries_of` says which. To `MappedDisk` a subcluster is a cluster, and a
part of an L2 table is a table: a whole L2 table would be 32 times as large in memory as in the file.
Source: QEMU, ``docs/interop/qcow2.txt``, "Extended L2 Entries". Must not write.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from xenbackend.block.extents import Extent, of_entries
from xenbackend.block.formats.qcow2 import SUBCLUSTERS, Header
from xenbackend.block.formats.qcow2_tables import (
    COMPRESSED,
    COPIED,
    compressed_place,
    l1_place,
    l2_place,
    unpack_table,
)
from xenbackend.block.mapped.inflated import Inflate, Inflated
from xenbackend.block.mapped.io import ImageIO
from xenbackend.block.mapped.shared import Then
from xenbackend.block.mapped.tables import READABLE, SPECIAL, ZERO, Table, Tables
from xenbackend.block.request import Request
from xenbackend.errors import DriverError

_PART_BITS = 8  # log2 of the L2 entries that are one table in memory: 4 KiB of the file
_ALL = (1 << SUBCLUSTERS) - 1
_UNREADABLE = [SPECIAL] * SUBCLUSTERS


class Part(array):  # type: ignore[type-arg]  # its items are the "Q" that it is made with
    """The subclusters' entries for a part of an L2 table; `words` has the first word of each of their clusters."""

    words: array[int]


class Subclusters:
    """Loads parts of L2 tables for a disk, and reads its compressed clusters.

    Args:
        io: the image's.
        header: the image's header.
        l1: the words of its L1 table.
        inflate: inflates a compressed cluster.
        tables: the disk's cache of tables, which has the parts.
    """

    table_bits = _PART_BITS + SUBCLUSTERS.bit_length() - 1  # of a part, in subclusters

    def __init__(self, io: ImageIO, header: Header, l1: Sequence[int], inflate: Inflate, tables: Tables[Table]) -> None:
        self._io = io
        self._header = header
        self._l1 = l1
        self._inflate = inflate
        self._inflated = Inflated(io, header.cluster_bits)
        self._tables = tables

    def load(self, number: int, then: Then) -> None:
        """Load a part of a table; see `MappedDisk.load_table`."""
        l1_index, part = divmod(number << _PART_BITS, 1 << self._header.l2_bits)
        try:
            place = l1_place(self._l1[l1_index], self._header)
        except DriverError:
            then(errno.EIO)
            return
        if place:
            self._io.read_meta(place + part * 16, 16 << _PART_BITS, partial(self._loaded, number, then))
        else:
            self._io.soon(partial(self._loaded, number, then, 0, memoryview(bytes(16 << _PART_BITS))))

    def read_special(self, request: Request) -> None:
        """Do a read inside a subcluster of a compressed cluster; end it with EIO if the cluster's entry is damaged."""
        header, cluster = self._header, request.offset >> self._header.cluster_bits
        part: Any = self._tables.find(cluster >> _PART_BITS)
        word = part.words[cluster & (1 << _PART_BITS) - 1]
        region = compressed_place(word, header.cluster_bits)
        if word & COMPRESSED and not header.has_data_file:
            self._inflated.read(request, word, region.offset, region.length, self._inflate)
        else:
            self._io.finish(request, errno.EIO)

    def extents(self, size: int) -> Iterator[Extent]:
        """Yield the image's extents of a disk of `size` bytes; it may block. Raises: DriverError, OSError."""
        header = self._header
        span = header.cluster_size << header.l2_bits
        for number, word in enumerate(self._l1[: -(-size // span)]):
            place = l1_place(word, header)
            if place:
                data = self._io.file.read_at(place, header.cluster_size)
                words = unpack_table(data + bytes(header.cluster_size - len(data)))
                entries = entries_of(words, header, number << header.l2_bits)
                yield from of_entries(entries, header.subcluster_size, number * span, size)
            else:
                yield from of_entries([0], span, number * span, size)

    def _loaded(self, number: int, then: Then, status: int, data: memoryview) -> None:
        if not status:
            words = unpack_table(bytes(data))
            part = Part("Q", entries_of(words, self._header, number << _PART_BITS))
            part.words = words[::2]
            self._tables.put(number, part)
        then(status)


def entries_of(words: Sequence[int], header: Header, first: int) -> array[int]:
    """Return the entries of subclusters, as in `block.mapped.tables`: 32 for each pair of words of an L2 table.

    READABLE with a place is data; ZERO is zeros, perhaps with a place that is reserved for data; 0 is the parent's.
    SPECIAL is a subcluster of a compressed cluster if the first word says so; else the two words contradict one
    another, and the whole cluster is unreadable.

    Args:
        words: pairs of words of an L2 table, or of a part of one.
        header: the image's header.
        first: the number of the disk's cluster that they begin with.
    """
    entries = array("Q")
    for cluster, (word, bitmap) in enumerate(zip(words[::2], words[1::2], strict=True), first):
        entries.extend(_of_cluster(word, bitmap, header, cluster << header.cluster_bits))
    return entries


def _of_cluster(word: int, bitmap: int, header: Header, on_disk: int) -> Sequence[int]:
    """Return the entries of one cluster: the low 32 bits of `bitmap` mark data, the high ones zeros."""
    if word & COMPRESSED:
        return _UNREADABLE
    try:
        place = l2_place(word, header)
    except DriverError:
        return _UNREADABLE
    data, zeros, size = bitmap & _ALL, bitmap >> SUBCLUSTERS, header.subcluster_size
    has_place = place or (header.has_data_file and word & COPIED)
    if data & zeros or (data and not has_place) or (header.has_data_file and has_place and place != on_disk):
        return _UNREADABLE
    if data == _ALL:
        return range(place | READABLE, (place | READABLE) + header.cluster_size, size)
    if not bitmap:
        return [0] * SUBCLUSTERS
    return [
        place + each * size | READABLE if data >> each & 1
        else (place and place + each * size) | ZERO if zeros >> each & 1
        else 0
        for each in range(SUBCLUSTERS)
    ]  # fmt: skip
