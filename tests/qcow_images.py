"""QCOW images for tests, byte by byte."""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Callable, Collection, Mapping

from xenbackend.block.formats.qcow2_tables import COMPRESSED, COPIED, OFFSET, ZERO, pack_refcounts, pack_table
from xenbackend.units import round_up

_BACKING_FORMAT = 0xE2792ACA
_DATA_NAME = 0x44415441
_APART, _BY_ZSTD, _EXTENDED = 1 << 2, 1 << 3, 1 << 4  # incompatible features


class _Image:
    """A file that grows by whole clusters."""

    def __init__(self, cluster_size: int) -> None:
        self.size = cluster_size
        self.clusters: list[bytes] = []

    def add(self, data: bytes) -> int:
        """Return the offset of new clusters with this content."""
        place = len(self.clusters) * self.size
        padded = data.ljust(max(self.size, round_up(len(data), self.size)), b"\0")
        self.clusters += [padded[start : start + self.size] for start in range(0, len(padded), self.size)]
        return place

    def set(self, place: int, data: bytes) -> None:
        """Replace the content of clusters."""
        for start in range(0, len(data), self.size):
            self.clusters[(place + start) // self.size] = data[start : start + self.size].ljust(self.size, b"\0")


def deflate(data: bytes) -> bytes:
    """Return a compressed cluster as QEMU writes it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def zstd(data: bytes) -> bytes:
    """Return a compressed cluster as QEMU writes it."""
    import zstandard  # other tests run where it is not installed, too

    return zstandard.ZstdCompressor().compress(data)


_PACKERS: dict[str, Callable[[bytes], bytes]] = {"zlib": deflate, "zstd": zstd}


def qcow2(
    size: int,
    clusters: Mapping[int, bytes] | None = None,
    *,
    cluster_bits: int = 12,
    order: int = 4,
    version: int = 3,
    backing: bytes = b"",
    backing_format: bytes = b"",
    compressed: Mapping[int, bytes] | None = None,
    zeros: Collection[int] = (),
    snapshot: bool = False,
    incompatible: int = 0,
    autoclear: int = 0,
    extensions: bytes = b"",
    table_clusters: int = 4,
    compression: str = "zlib",
    data_name: bytes | None = None,
    bitmaps: Mapping[int, int] | None = None,
) -> bytes:
    """Return a QCOW2 image.

    Args:
        size: bytes of the disk.
        clusters: the content of those that it has, by number.
        cluster_bits: a cluster has 2 to the power of this many bytes.
        order: a refcount has 2 to the power of this many bits.
        version: 2 or 3.
        backing: the name of the parent.
        backing_format: its format, as QEMU says it.
        compressed: the content of clusters that are compressed, by number.
        zeros: numbers of clusters that read as zeros.
        snapshot: there is a snapshot of all of it.
        incompatible: feature bits.
        autoclear: feature bits.
        extensions: bytes of header extensions before that of the format.
        table_clusters: of the refcount table.
        compression: how compressed clusters are: "zlib" or "zstd".
        data_name: of the external data file, if there is one: then the content of clusters is not in this file.
        bitmaps: the second words of entries with subclusters, by cluster; None: the image has no subclusters.
    """
    step = 1 if bitmaps is None else 2  # words of an entry
    by_zstd = compression == "zstd"
    cluster_size = 1 << cluster_bits
    per_table = cluster_size // 8 // step
    image = _Image(cluster_size)
    image.add(b"")  # the header
    table_place = image.add(bytes(table_clusters * cluster_size))
    words: dict[int, int] = dict.fromkeys(zeros, ZERO)
    copied = 0 if snapshot else COPIED
    for number, data in (clusters or {}).items():
        words[number] = (image.add(data) if data_name is None else number * cluster_size) | copied
    for number, data in (compressed or {}).items():
        packed = _PACKERS[compression](data)
        words[number] = COMPRESSED | image.add(packed) | (len(packed) - 1) // 512 << 62 - (cluster_bits - 8)
    l1 = array("Q", bytes(8 * -(-size // (per_table * cluster_size))))
    for number in range(len(l1)):
        here = range(number * per_table, (number + 1) * per_table)
        table = array("Q", [words.get(place, 0) for place in here])
        if bitmaps is not None:
            table = array("Q", [word for place in here for word in (words.get(place, 0), bitmaps.get(place, 0))])
        if any(table):
            l1[number] = image.add(pack_table(table)) | copied
    counts = dict.fromkeys(range(1 + table_clusters, len(image.clusters)), 2 if snapshot else 1)
    l1_place = image.add(pack_table(l1))
    snapshots = 0
    if snapshot:
        copy = image.add(pack_table(l1))
        fixed = struct.pack(">QIHHIIQII", copy, len(l1), 1, 1, 0, 0, 0, 0, 16)
        snapshots = image.add(fixed + struct.pack(">QQ", 0, size) + b"1a")
    table = _add_refcounts(image, counts, order)
    assert len(table) * 8 <= table_clusters * cluster_size, "the refcount table is too small"
    image.set(table_place, pack_table(table))
    fields = (
        b"QFI\xfb", version, 0, 0, cluster_bits, size, 0, len(l1), l1_place, table_place, table_clusters,
        int(snapshot), snapshots,
    )  # fmt: skip
    incompatible |= (_BY_ZSTD if by_zstd else 0) | (0 if data_name is None else _APART)
    incompatible |= 0 if bitmaps is None else _EXTENDED
    rest = struct.pack(">QQQII", incompatible, 0, autoclear, order, 112 if by_zstd else 104) if version == 3 else b""
    rest += struct.pack(">Bxxxxxxx", 1) if by_zstd else b""
    rest += extensions
    for kind, text in ((_BACKING_FORMAT, backing_format), (_DATA_NAME, data_name)):
        if text:
            rest += struct.pack(">II", kind, len(text)) + text.ljust(round_up(len(text), 8), b"\0")
    rest += bytes(8)
    if backing:
        fields = (*fields[:2], 72 + len(rest), len(backing), *fields[4:])
    image.set(0, struct.pack(">4sIQIIQIIQQIIQ", *fields) + rest + backing)
    return b"".join(image.clusters)


def with_word(image: bytes, level: int, word: Callable[[int], int], index: int = 0) -> bytes:
    """Return an image with another word in its L1 table, or in its first L2 table; `word` maps the old word to it."""
    place = int.from_bytes(image[40:48], "big")
    if level == 2:
        place = int.from_bytes(image[place : place + 8], "big") & OFFSET
    place += index * 8
    changed = word(int.from_bytes(image[place : place + 8], "big"))
    return image[:place] + changed.to_bytes(8, "big") + image[place + 8 :]


def _add_refcounts(image: _Image, counts: dict[int, int], order: int) -> array[int]:
    """Add refcount blocks that count everything, including themselves; return the refcount table."""
    per_block = image.size * 8 >> order
    used = len(image.clusters)
    blocks = 1
    while (used + blocks) > blocks * per_block:
        blocks += 1
    table = array("Q")
    for block in range(blocks):
        numbers = range(block * per_block, (block + 1) * per_block)
        refcounts = array("Q", [counts.get(each, 1) if each < used + blocks else 0 for each in numbers])
        table.append(image.add(pack_refcounts(refcounts, order)))
    return table


def qcow(
    size: int,
    clusters: Mapping[int, bytes] | None = None,
    *,
    cluster_bits: int = 12,
    l2_bits: int = 9,
    backing: bytes = b"",
    compressed: Mapping[int, bytes] | None = None,
) -> bytes:
    """Return a QCOW image of version 1; arguments as for `qcow2`."""
    cluster_size = 1 << cluster_bits
    image = _Image(cluster_size)
    l1 = array("Q", bytes(8 * -(-size // (cluster_size << l2_bits))))
    l1_place = round_up(48 + len(backing), 8)
    image.add(bytes(l1_place + 8 * len(l1)))
    words = {number: image.add(data) for number, data in (clusters or {}).items()}
    for number, data in (compressed or {}).items():
        packed = deflate(data)
        words[number] = 1 << 63 | len(packed) << 63 - cluster_bits | image.add(packed)
    for number in range(len(l1)):
        table = array("Q", [words.get((number << l2_bits) + place, 0) for place in range(1 << l2_bits)])
        if any(table):
            l1[number] = image.add(pack_table(table))
    fields = (b"QFI\xfb", 1, 48 if backing else 0, len(backing), 0, size, cluster_bits, l2_bits, 0, 0, l1_place)
    head = (struct.pack(">4sIQIIQBBHIQ", *fields) + backing).ljust(l1_place, b"\0") + pack_table(l1)
    image.set(0, head)
    return b"".join(image.clusters)
