"""Translates L1 and L2 tables of each version of QCOW: the file's words to entries, and back.

Must not do I/O. A table is checked as a whole when it is loaded: a single word with an impossible place makes all of it
unreadable. Reserved bits are ignored, as by QEMU: `image check` reports them, and the rest of the table is valid.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from xenbackend.block.formats import qcow, qcow2, qcow2_tables
from xenbackend.block.formats.common import damaged
from xenbackend.block.formats.qcow2 import Region
from xenbackend.block.formats.qcow2_tables import COMPRESSED, COPIED, OFFSET
from xenbackend.block.mapped.tables import OWNED, PLACE, READABLE, SPECIAL, WRITABLE, ZERO


class Version2:
    """QCOW2: a word says whether its cluster may be written in place, is zeros, or is compressed."""

    def __init__(self, header: qcow2.Header) -> None:
        self._header = header
        self.l2_bits = header.l2_bits
        self._places = OFFSET & ~(header.cluster_size - 1)
        self._is_apart = header.has_data_file

    def decode_l1(self, word: int) -> tuple[int, bool]:
        """See `Codec`."""
        place = qcow2_tables.l1_place(word, self._header)
        return place, bool(place and word & COPIED)  # with place 0 it would be written over the header

    def encode_l1(self, place: int) -> int:
        """See `Codec`."""
        return place | COPIED

    def decode_l2(self, words: array[int]) -> array[int]:
        """See `Codec`."""
        places, odd = self._places, {}
        if not {word & ~places for word in words} <= {0, COPIED} or COPIED in words:
            odd = {index: self._odd(word) for index, word in enumerate(words) if word & ~places or word == COPIED}
        entries = array("Q", [word & places | OWNED if word >= COPIED else word and word | READABLE for word in words])
        for index, entry in odd.items():
            entries[index] = entry
        return entries

    def map_l2(self, words: array[int]) -> array[int]:
        """Return the entries, for zero clusters with the place that is reserved for them. Raises: DriverError."""
        entries = self.decode_l2(words)
        for index, entry in enumerate(entries):
            if entry == ZERO:
                entries[index] |= words[index] & self._places
        return entries

    def encode_l2(self, entry: int) -> int:
        """See `Codec`."""
        if entry & ZERO:
            return qcow2_tables.ZERO
        return entry & PLACE | (COPIED if entry & WRITABLE else 0)

    def check_table(self, number: int, entries: array[int]) -> None:
        """See `Codec`. In an external data file each cluster has to be at the same place as on the disk."""
        if not self._is_apart:
            return
        size, place = self._header.cluster_size, number << self.l2_bits + self._header.cluster_bits
        for entry in entries:
            if entry & READABLE and entry & PLACE != place:
                raise damaged(f"a cluster of its data file is at byte {entry & PLACE}, not at {place}")
            place += size

    def places_of(self, word: int) -> Sequence[int]:
        """See `Codec`."""
        if self._is_apart:  # clusters in the data file have no refcounts
            return ()
        if not word & COMPRESSED:
            return [word & OFFSET] if word & OFFSET else []
        region = self.compressed_place(word)
        size = self._header.cluster_size
        return range(region.offset // size * size, region.offset + region.length, size)

    def compressed_place(self, word: int) -> Region:
        """Return where the bytes of a compressed cluster are."""
        return qcow2_tables.compressed_place(word, self._header.cluster_bits)

    def _odd(self, word: int) -> int:
        """Return the entry for a word that may have other bits than a place. Raises: DriverError."""
        place = qcow2_tables.l2_place(word, self._header)
        if word & COMPRESSED:
            if self._is_apart:
                raise damaged("a cluster is compressed, which is not possible in a data file")
            return SPECIAL
        if word & qcow2_tables.ZERO:
            return ZERO
        if word & COPIED and (place or self._is_apart):
            return place | OWNED
        return place and place | READABLE


class Version1:
    """QCOW version 1: a word is a place, or a compressed cluster. Clusters are never shared, and never freed."""

    def __init__(self, header: qcow.Header) -> None:
        self._header = header
        self.l2_bits = header.l2_bits

    def decode_l1(self, word: int) -> tuple[int, bool]:
        """See `Codec`."""
        if word & ~PLACE:
            raise damaged(f"an entry of its L1 table is {word:#x}")
        return word, word != 0

    def encode_l1(self, place: int) -> int:
        """See `Codec`."""
        return place

    def decode_l2(self, words: array[int]) -> array[int]:
        """See `Codec`."""
        if not any(words):
            return array("Q", bytes(8 * len(words)))  # a new table: the general way takes 20 times as long
        inside = self._header.cluster_size - 1
        if any(word & inside for word in words if not word & qcow.COMPRESSED):
            raise damaged("an entry of its L2 tables does not point to a cluster")
        return array("Q", [word and (SPECIAL if word & qcow.COMPRESSED else word | OWNED) for word in words])

    def map_l2(self, words: array[int]) -> array[int]:
        """Return the entries, as `decode_l2`: there are no zero clusters. Raises: DriverError."""
        return self.decode_l2(words)

    def check_table(self, number: int, entries: array[int]) -> None:
        """Accept everything: nothing in this format could contradict it."""

    def encode_l2(self, entry: int) -> int:
        """See `Codec`."""
        return entry & PLACE

    def places_of(self, word: int) -> Sequence[int]:  # noqa: ARG002 - the format cannot mark clusters as free
        """See `Codec`."""
        return ()

    def compressed_place(self, word: int) -> Region:
        """Return where the bytes of a compressed cluster are."""
        return qcow.compressed_place(word, self._header.cluster_bits)
