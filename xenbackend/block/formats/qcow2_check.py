"""Checks a QCOW2 image: compares every cluster that its tables reach with the refcounts that it stores.

Must not write, nor decide what is done about a fault: `qcow2_repair` plans the writes of a repair.

Agrees with ``qemu-img check`` on whether there is an error, and on the number of leaked clusters, with one exception: a
refcount that is too high is never more than a leak here, whatever the entry's flag says. Faults are counted, and the
first ones are described in sentences.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from xenbackend.block.formats import qcow2_tables as tables
from xenbackend.block.formats.common import Read
from xenbackend.block.formats.qcow2 import CORRUPT, DIRTY, Region, parse_header
from xenbackend.block.formats.qcow2_tables import COMPRESSED, COPIED, OFFSET
from xenbackend.errors import DriverError
from xenbackend.units import round_up

MAX_SENTENCES = 50
_PAGE_BITS = 12  # counts are kept in pages of 4096 clusters, so that a sparse file needs memory only for its used parts


@dataclass
class Report:
    """The result of a check. The integers are numbers of clusters or entries."""

    clusters: int = 0  # in the file
    leaks: int = 0  # refcounts that are too high: room that is lost until a repair, and no danger
    low_refcounts: int = 0  # danger: a cluster in use may be handed out again
    wrong_flags: int = 0  # entries whose "copied" flag contradicts the refcount
    broken: int = 0  # faults that new refcounts cannot repair: entries out of range, overlapping tables
    is_dirty: bool = False  # the image itself says that its refcounts may be wrong
    is_corrupt: bool = False  # the image itself says that it is damaged
    sentences: list[str] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """The number of all faults that endanger data."""
        return self.low_refcounts + self.wrong_flags + self.broken

    def say(self, sentence: str) -> None:
        """Add a sentence, unless there are MAX_SENTENCES already."""
        if len(self.sentences) < MAX_SENTENCES:
            self.sentences.append(sentence)


class Counts:
    """The number of uses of each cluster, in pages that are made when needed."""

    def __init__(self, block_bits: int) -> None:
        self.page_bits = min(block_bits, _PAGE_BITS)  # so that a refcount block is whole pages
        self.pages: dict[int, array[int]] = {}

    def add(self, cluster: int, times: int) -> None:
        """Count uses of a cluster."""
        number = cluster >> self.page_bits
        page = self.pages.get(number)
        if page is None:
            page = self.pages[number] = self.empty()
        page[cluster & ((1 << self.page_bits) - 1)] += times

    def __getitem__(self, cluster: int) -> int:
        page = self.pages.get(cluster >> self.page_bits)
        return page[cluster & ((1 << self.page_bits) - 1)] if page is not None else 0

    def empty(self) -> array[int]:
        """Return a page with all counts 0."""
        return array("Q", bytes(8 << self.page_bits))


class Check:
    """A check of a whole image. `run` sets `report`, `counts` and `blocks`.

    Args:
        read: reads the image file.
        file_size: the image file's size in bytes.

    Raises: DriverError if the header is not that of an image that we could serve.
    """

    def __init__(self, read: Read, file_size: int) -> None:
        self.read = read
        self.file_size = file_size
        self.header = parse_header(read, file_size)
        self.counts = Counts(self.header.block_bits)
        self.report = Report(
            clusters=-(-file_size >> self.header.cluster_bits),
            is_dirty=bool(self.header.incompatible & DIRTY),
            is_corrupt=bool(self.header.incompatible & CORRUPT),
        )
        self._step = 2 if self.header.has_subclusters else 1  # words of an entry of an L2 table
        self.blocks: list[int] = []  # the refcount table: offsets of refcount blocks, 0 for none
        self._metadata: dict[int, int] = {}  # how often a cluster of metadata may be used

    def run(self) -> Report:
        """Check everything. Raises: OSError if the file cannot be read."""
        header = self.header
        self._use_metadata("the header", Region(0, header.cluster_size))
        self._use_metadata("the refcount table", header.refcount_table)
        active = self.table(header.l1)
        self._use_metadata("the L1 table", header.l1)
        l2_tables = self._l2_of(active)
        for number, (region, count) in enumerate(Counter(self._snapshots()).items()):
            for offset, times in self._l2_of(self.table(region)).items():
                l2_tables[offset] += times * count
            self._use_metadata(f"the L1 table of snapshot {number}", region)
        self._use_bitmaps()
        for offset, times in l2_tables.items():
            self._use_l2(offset, times)
        if header.has_data_file:
            self._check_places(active)
        self._use_blocks()
        self._check_overlaps()
        self._check_refcounts()
        for _ in self.wrong_flags():
            self.report.wrong_flags += 1
        return self.report

    def table(self, region: Region) -> array[int]:
        """Return a table of 64-bit words; beyond the end of the file there are zeros."""
        data = self.read(region.offset, region.length)
        return tables.unpack_table(data + bytes(region.length - len(data)))

    def wrong_flags(self) -> Iterator[tuple[int, array[int], int]]:
        """Yield the entries of the active tables whose flag is wrong: the table's offset, the table, the index."""
        l1 = self.table(self.header.l1)
        for index, entry in enumerate(l1):
            offset = entry & OFFSET
            if not offset or not self._is_cluster(offset):
                continue
            if self._is_flag_wrong(entry):
                yield self.header.l1.offset, l1, index
            l2 = self.table(Region(offset, self.header.cluster_size))
            is_wrong = self._is_flag_missing if self.header.has_data_file else self._is_flag_wrong
            for place in range(0, len(l2), self._step):
                if l2[place] and is_wrong(l2[place]):
                    yield offset, l2, place

    def _is_flag_missing(self, entry: int) -> bool:
        """Return whether an entry of an L2 table lacks the flag that all clusters of a data file have."""
        return bool(entry & OFFSET) and not entry & (COMPRESSED | COPIED)

    def _is_flag_wrong(self, entry: int) -> bool:
        if entry & COMPRESSED or not entry & OFFSET or not self._is_cluster(entry & OFFSET):
            return False
        return (self.counts[(entry & OFFSET) >> self.header.cluster_bits] == 1) != bool(entry & COPIED)

    def _is_cluster(self, offset: int) -> bool:
        return not offset & (self.header.cluster_size - 1) and offset >> self.header.cluster_bits < self.report.clusters

    def _snapshots(self) -> list[Region]:
        if not self.header.snapshot_count:
            return []
        try:
            region, l1_tables = tables.parse_snapshots(self.read, self.header, self.file_size)
        except DriverError as error:
            self._break(error.problem)
            return []
        self._use_metadata("the snapshot table", region)
        return l1_tables

    def _use_bitmaps(self) -> None:
        try:
            for region in tables.parse_bitmaps(self.read, self.header, self.file_size):
                self._use_metadata("a bitmap", region)
        except DriverError as error:
            self._break(error.problem)

    def _use_blocks(self) -> None:
        for number, entry in enumerate(self.table(self.header.refcount_table)):
            try:
                offset = tables.refcount_block_of(entry, self.header)
            except DriverError as error:
                self._break(error.problem)
                offset = 0
            if offset and not self._is_cluster(offset):
                self._break(f"refcount block {number} at byte {offset} is outside the file")
                offset = 0
            if offset:
                self._use_metadata(f"refcount block {number}", Region(offset, self.header.cluster_size))
            self.blocks.append(offset)

    def _l2_of(self, l1: array[int]) -> Counter[int]:
        """Return how often each L2 table is used by an L1 table."""
        found: Counter[int] = Counter()
        for entry in filter(None, l1):
            try:
                tables.check_l1_entry(entry, self.header)
            except DriverError as error:
                self._break(error.problem)
                continue
            found[entry & OFFSET] += 1
        return found

    def _use_l2(self, offset: int, times: int) -> None:
        header, add, bits = self.header, self.counts.add, self.header.cluster_bits
        if not self._is_cluster(offset):
            self._break(f"an L2 table at byte {offset} is outside the file")
            return
        if offset >> bits in self._metadata:
            self._break(f"an L2 table at byte {offset} is where other metadata is")
        self._metadata[offset >> bits] = times
        add(offset >> bits, times)
        end = 0 if header.has_data_file else self.report.clusters  # clusters of a data file are not counted
        plain = OFFSET & ~(header.cluster_size - 1) | COPIED
        table = self.table(Region(offset, header.cluster_size))
        if header.has_subclusters:
            self._check_bitmaps(table)
        for entry in filter(None, table[:: self._step]):
            cluster = (entry & OFFSET) >> bits
            if entry & ~plain == 0 and 0 < cluster < end:
                add(cluster, times)
            else:
                self._use_odd(entry, times)

    def _use_odd(self, entry: int, times: int) -> None:
        """Count the clusters of an entry that is not just a place: compressed, zeros, or broken."""
        try:
            tables.check_l2_entry(entry, self.header)
        except DriverError as error:
            self._break(error.problem)
            return
        if self.header.has_data_file:
            return
        if entry & COMPRESSED:
            region = tables.compressed_place(entry, self.header.cluster_bits)
            self._use("a compressed cluster", region, times)
        elif entry & OFFSET:
            self._use("a cluster", Region(entry & OFFSET, self.header.cluster_size), times)

    def _check_bitmaps(self, table: array[int]) -> None:
        for entry, bitmap in zip(table[::2], table[1::2], strict=True):
            try:
                tables.check_bitmap(entry, bitmap, self.header)
            except DriverError as error:
                self._break(error.problem)

    def _check_places(self, l1: array[int]) -> None:
        """Find clusters of the external data file that are not at the same place as on the disk."""
        header = self.header
        for number, l1_entry in enumerate(l1):
            offset, place = l1_entry & OFFSET, number << header.l2_bits + header.cluster_bits
            if not offset or not self._is_cluster(offset):
                continue
            for entry in self.table(Region(offset, header.cluster_size))[:: self._step]:
                is_there = entry & OFFSET or entry & (COPIED | tables.ZERO) == COPIED
                if entry & COMPRESSED:
                    self._break(f"the cluster at byte {place} of the disk is compressed, but belongs in the data file")
                elif is_there and entry & OFFSET != place:
                    self._break(f"the cluster at byte {place} of the disk is at byte {entry & OFFSET} of the data file")
                place += header.cluster_size

    def _use_metadata(self, what: str, region: Region) -> None:
        if self._use(what, region, 1):
            self._metadata |= dict.fromkeys(self._clusters(region), 1)

    def _use(self, what: str, region: Region, times: int) -> bool:
        """Count a region, or report that it is outside the file, which may end inside its last cluster."""
        if region.offset + region.length > round_up(self.file_size, self.header.cluster_size):
            self._break(f"{what}, {region.length} bytes at byte {region.offset}, is outside the file")
            return False
        for cluster in self._clusters(region):
            self.counts.add(cluster, times)
        return True

    def _clusters(self, region: Region) -> range:
        bits = self.header.cluster_bits
        return range(region.offset >> bits, ((region.offset + region.length - 1) >> bits) + 1)

    def _check_overlaps(self) -> None:
        """Find clusters of metadata with other uses. Clusters of data may be shared, if their refcounts say so."""
        for cluster, times in self._metadata.items():
            if self.counts[cluster] != times:
                self._break(f"cluster {cluster} holds metadata, but something else uses it too")

    def _check_refcounts(self) -> None:
        without_block = set(self.counts.pages)
        for number, stored in self._stored_pages():
            without_block.discard(number)
            counted = self.counts.pages.get(number) or self.counts.empty()
            if counted != stored:
                self._compare(number, counted, stored)
        for number in sorted(without_block):
            self._compare(number, self.counts.pages[number], self.counts.empty())

    def _stored_pages(self) -> Iterator[tuple[int, array[int]]]:
        """Yield the number and refcounts of each page that is in a refcount block and inside the file."""
        header, page_bits = self.header, self.counts.page_bits
        page_bytes = (1 << page_bits + header.refcount_order) >> 3
        per_block = 1 << header.block_bits - page_bits
        end = -(-self.report.clusters >> page_bits)
        for index, offset in enumerate(self.blocks):
            if not offset:
                continue
            data = self.read(offset, header.cluster_size)
            data += bytes(header.cluster_size - len(data))
            for place, number in enumerate(range(index * per_block, min((index + 1) * per_block, end))):
                part = data[place * page_bytes :][:page_bytes]
                yield number, array("Q", tables.unpack_refcounts(part, header.refcount_order))

    def _compare(self, number: int, counted: array[int], stored: array[int]) -> None:
        first = number << self.counts.page_bits
        for place, (uses, refcount) in enumerate(zip(counted, stored, strict=True)):
            cluster = first + place
            if refcount == uses or cluster >= self.report.clusters:
                continue
            if refcount > uses:
                self.report.leaks += 1
                self.report.say(
                    f"cluster {cluster} is leaked: its refcount is {refcount}, but it has {uses} references"
                )
            else:
                self.report.low_refcounts += 1
                self.report.say(f"cluster {cluster} has refcount {refcount}, but {uses} references")

    def _break(self, sentence: str) -> None:
        self.report.broken += 1
        self.report.say(sentence)


def check(read: Read, file_size: int) -> Report:
    """Check an image. Raises: DriverError if it is no image that we could serve; OSError."""
    return Check(read, file_size).run()
