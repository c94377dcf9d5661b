"""The header of a QCOW2 image: bytes to values, and bytes for the fields that may change.

Source: QEMU, ``docs/interop/qcow2.txt``, "Header", "Header extensions", "Feature name table". All numbers there are big
endian. Must not open a file, nor take a size or an offset from an image without checking it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from xenbackend.block.formats.common import Read, damaged
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.units import format_size, round_up

MAGIC = b"QFI\xfb"
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21  # 512 bytes to 2 MiB, as in QEMU
MAX_REFCOUNT_ORDER = 6
MAX_L1_BYTES = 32 << 20  # as in QEMU
MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # as in QEMU
MAX_SNAPSHOTS = 65536  # as in QEMU
MAX_NAME = 1023  # bytes of a parent's name
SUBCLUSTERS = 32  # of a cluster, if the image has subclusters
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4  # incompatible features
BITMAPS, RAW_DATA = 1 << 0, 1 << 1  # auto-clear features

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_V3_LENGTH = _V2.size + _V3.size
_BACKING_AT = 8  # in the header: place and length of the parent's name
_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct("BB46s")
_BITMAPS_EXTENSION = struct.Struct(">IIQQ")
BACKING_FORMAT, _FEATURE_NAMES, _BITMAPS, _DATA_NAME = 0xE2792ACA, 0x6803F857, 0x23852875, 0x44415441
_KNOWN = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
_COMPRESSION_AT = 104  # place of the type of compression, in a header that is long enough
_COMPRESSIONS = ("zlib", "zstd")  # by number


@dataclass(frozen=True, slots=True)
class Region:
    """A range of the image file, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a header, with every number checked. Sizes and offsets are in bytes."""

    version: int
    size: int
    cluster_bits: int
    refcount_order: int  # a refcount has 1 << refcount_order bits
    l1: Region
    refcount_table: Region
    snapshot_count: int
    snapshots_offset: int
    incompatible: int
    autoclear: int
    compression: str  # of compressed clusters: "zlib" or "zstd"
    backing_file: bytes  # empty if the image has no parent
    backing_format: str  # empty if the image does not say
    data_name: bytes  # of the external data file; empty if the image does not say
    bitmap_count: int
    bitmap_directory: Region | None  # None unless the bitmaps are consistent

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def has_data_file(self) -> bool:
        """Whether its clusters are in another file, each at the same place as on the disk."""
        return bool(self.incompatible & DATA_FILE)

    @property
    def kept_autoclear(self) -> int:
        """The auto-clear features that remain true when we write."""
        return self.autoclear & RAW_DATA

    @property
    def l2_bits(self) -> int:
        """An L2 table has 1 << l2_bits entries."""
        return self.cluster_bits - 3 - self.has_subclusters

    @property
    def has_subclusters(self) -> bool:
        """Whether an entry of an L2 table has two words, the second of which is about the cluster's 32 parts."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def subcluster_size(self) -> int:
        """Bytes of a subcluster, if the image has any."""
        return self.cluster_size // SUBCLUSTERS

    @property
    def block_bits(self) -> int:
        """A refcount block has 1 << block_bits entries."""
        return self.cluster_bits + 3 - self.refcount_order

    @property
    def max_refcount(self) -> int:
        """The largest refcount that can be stored."""
        return (1 << (1 << self.refcount_order)) - 1


def parse_header(read: Read, file_size: int) -> Header:
    """Parse the header of an image.

    Args:
        read: reads the image file.
        file_size: the image file's size in bytes.

    Raises: DriverError if it is no QCOW2 image, or is damaged, or has a feature that we do not support.
    """
    start = read(0, _V3_LENGTH)
    if len(start) < _V2.size or start[:4] != MAGIC:
        raise DriverError("it is not a QCOW2 image: it does not begin as one")
    (
        _, version, backing_offset, backing_length, cluster_bits, size, crypt_method, l1_entries, l1_offset,
        table_offset, table_clusters, snapshot_count, snapshots_offset,
    ) = _V2.unpack_from(start)  # fmt: skip
    _check_kind(version, cluster_bits, crypt_method, file_size)
    cluster_size = 1 << cluster_bits
    incompatible, autoclear, refcount_order, length = _parse_v3(start, cluster_size) if version == 3 else (0, 0, 4, 72)
    first = read(0, cluster_size)
    extensions = dict(_extensions(first, length, backing_offset or cluster_size))
    _check_features(incompatible, extensions.get(_FEATURE_NAMES, b""))
    _check_disk_size(size, l1_entries, cluster_bits, incompatible)
    l1 = Region(l1_offset, l1_entries * 8)
    table = Region(table_offset, table_clusters * cluster_size)
    check_region("L1 table", l1, MAX_L1_BYTES, cluster_size, file_size)
    check_region("refcount table", table, MAX_REFCOUNT_TABLE_BYTES, cluster_size, file_size)
    if snapshot_count > MAX_SNAPSHOTS or (snapshot_count and snapshots_offset % cluster_size):
        raise damaged(f"it has {snapshot_count} snapshots at byte {snapshots_offset}")
    bitmap_count, directory = _parse_bitmaps(extensions.get(_BITMAPS, b"") if autoclear & BITMAPS else b"")
    return Header(
        version=version,
        size=size,
        cluster_bits=cluster_bits,
        refcount_order=refcount_order,
        l1=l1,
        refcount_table=table,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        incompatible=incompatible,
        autoclear=autoclear,
        compression=_compression(first[_COMPRESSION_AT:length], incompatible),
        backing_file=_backing_name(first, backing_offset, backing_length) if backing_offset else b"",
        backing_format=extensions.get(BACKING_FORMAT, b"").decode("ascii", "replace"),
        data_name=_data_name(extensions.get(_DATA_NAME, b""), incompatible, autoclear),
        bitmap_count=bitmap_count,
        bitmap_directory=directory,
    )


def autoclear_bytes(autoclear: int) -> tuple[int, bytes]:
    """Return the place in the file of version 3's auto-clear features, and their bytes."""
    return 88, autoclear.to_bytes(8, "big")


def incompatible_bytes(incompatible: int) -> tuple[int, bytes]:
    """Return the place in the file of version 3's incompatible features, and their bytes."""
    return 72, incompatible.to_bytes(8, "big")


def refcount_table_bytes(table: Region, cluster_size: int) -> tuple[int, bytes]:
    """Return the place in the file of the fields about the refcount table, and their bytes, all in one sector."""
    return 48, struct.pack(">QI", table.offset, table.length // cluster_size)


def with_parent(read: Read, header: Header, name: bytes, image_format: str) -> list[tuple[int, bytes]]:
    """Return the writes that give an image another parent, or no parent if `name` is empty.

    Each write has to be durable before the next. If there is room, the name goes after everything that is there. Then,
    as a rule, the change is in the first sector alone, and a kill or a power failure leaves the old parent or the new.

    Raises: ConfigError if the first cluster has no room for the name.
    """
    first = read(0, header.cluster_size)
    backing_offset, backing_length = struct.unpack_from(">QI", first, _BACKING_AT)
    start = struct.unpack_from(">I", first, _V3_LENGTH - 4)[0] if header.version == 3 else _V2.size
    kept = list(_extensions(first, start, backing_offset or header.cluster_size))
    others = [(kind, data) for kind, data in kept if kind != BACKING_FORMAT]
    extensions = [(BACKING_FORMAT, image_format.encode()), *others] if name else others
    packed = b"".join(pack_extension(kind, data) for kind, data in extensions) + pack_extension(0, b"")
    used = start + sum(_EXTENSION.size + round_up(len(data), 8) for _, data in [*kept, (0, b"")])
    place = max(round_up(max(used, backing_offset + backing_length), 8), start + len(packed))
    if place + len(name) > header.cluster_size:
        place = start + len(packed)
    if len(name) > MAX_NAME or place + len(name) > header.cluster_size:
        raise ConfigError(f"the parent's name has {len(name)} bytes, too many for the image's header")
    front = bytearray(first[:start] + packed)
    struct.pack_into(">QI", front, _BACKING_AT, place if name else 0, len(name))
    return [(place, name), (0, bytes(front))] if name else [(0, bytes(front))]


def pack_extension(kind: int, data: bytes) -> bytes:
    """Return the bytes of a header extension; kind 0 ends the list."""
    return _EXTENSION.pack(kind, len(data)) + data.ljust(round_up(len(data), 8), b"\0")


def check_region(what: str, region: Region, most: int, cluster_size: int, file_size: int) -> None:
    """Refuse a table that is empty, too large, misaligned or beyond the end of the file. Raises: DriverError."""
    offset, length = region.offset, region.length
    if not 0 < length <= most:
        raise damaged(f"its {what} has {length} bytes and not 1 to {most}")
    if offset % cluster_size or not cluster_size <= offset <= round_up(file_size, cluster_size) - length:
        raise damaged(f"its {what} of {length} bytes at byte {offset} is not inside the file of {file_size}")


def _check_kind(version: int, cluster_bits: int, crypt_method: int, file_size: int) -> None:
    if version not in (2, 3):
        hint = "; write qcow: for it" if version == 1 else ""
        raise DriverError(f"it is a QCOW image of version {version} and not 2 or 3{hint}")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise damaged(f"its clusters have 2^{cluster_bits} bytes and not 512 to 2 MiB")
    if crypt_method:
        raise DriverError("it is encrypted, which is not supported; decrypt it with qemu-img convert")
    if file_size < 1 << cluster_bits:
        raise damaged(f"its file of {file_size} bytes is cut short")


def _parse_v3(start: bytes, cluster_size: int) -> tuple[int, int, int, int]:
    """Return incompatible and auto-clear features, refcount order and header length."""
    if len(start) < _V3_LENGTH:
        raise damaged("its header is cut short")
    incompatible, _, autoclear, refcount_order, length = _V3.unpack_from(start, _V2.size)
    if not _V3_LENGTH <= length <= cluster_size or length % 8:
        raise damaged(f"its header has {length} bytes")
    if refcount_order > MAX_REFCOUNT_ORDER:
        raise damaged(f"its refcounts have 2^{refcount_order} bits and not 1 to 64")
    return incompatible, autoclear, refcount_order, length


def _extensions(first: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield kind and data of the header extensions between two places of the first cluster."""
    place = start
    while place + _EXTENSION.size <= min(end, len(first)):
        kind, length = _EXTENSION.unpack_from(first, place)
        if kind == 0:
            return
        place += _EXTENSION.size
        if length > end - place:
            raise damaged(f"its header extension {kind:#x} has {length} bytes")
        yield kind, first[place : place + length]
        place += round_up(length, 8)


def _check_features(incompatible: int, names: bytes) -> None:
    """Refuse features that we do not know, with the name that the image gives them. Raises: DriverError."""
    unknown = incompatible & ~_KNOWN
    if unknown:
        known = {bit: name for kind, bit, name in _FEATURE.iter_unpack(names[: len(names) // 48 * 48]) if kind == 0}
        bit = unknown.bit_length() - 1
        name = printable(known.get(bit, b"").rstrip(b"\0").decode("utf-8", "replace")) or f"number {bit}"
        raise DriverError(f"it has the incompatible feature {name!r}, which is not supported")


def _compression(field: bytes, incompatible: int) -> str:
    """Return the type of compression. The field and the feature bit have to agree, as QEMU demands."""
    kind = field[0] if field else 0
    if bool(kind) != bool(incompatible & COMPRESSION):
        raise damaged(f"its clusters are compressed by method {kind}, which its features contradict")
    if kind >= len(_COMPRESSIONS):
        raise DriverError(f"its clusters are compressed by method {kind}, which is not supported")
    return _COMPRESSIONS[kind]


def _backing_name(first: bytes, offset: int, length: int) -> bytes:
    name = first[offset : offset + length]
    if length > MAX_NAME or len(name) != length or b"\0" in name:
        raise damaged(f"the name of its parent has {length} bytes at byte {offset}")
    return name


def _data_name(name: bytes, incompatible: int, autoclear: int) -> bytes:
    if not incompatible & DATA_FILE:
        if autoclear & RAW_DATA:
            raise damaged("it is marked as having a raw external data file, but also as having none")
        return b""
    if len(name) > MAX_NAME or b"\0" in name:
        raise damaged(f"the name of its data file has {len(name)} bytes")
    return name


def _parse_bitmaps(extension: bytes) -> tuple[int, Region | None]:
    if len(extension) < _BITMAPS_EXTENSION.size:
        return 0, None
    count, _, length, offset = _BITMAPS_EXTENSION.unpack_from(extension)
    return count, Region(offset, length)


def _check_disk_size(size: int, l1_entries: int, cluster_bits: int, incompatible: int) -> None:
    if size % 512:
        raise DriverError(f"its size, {size} bytes, is not a multiple of 512; make it one with qemu-img resize")
    entry_bits = 4 if incompatible & EXTENDED_L2 else 3  # bytes of an entry of an L2 table
    if 1 << cluster_bits < SUBCLUSTERS << MIN_CLUSTER_BITS and incompatible & EXTENDED_L2:
        raise damaged(f"its clusters have 2^{cluster_bits} bytes, too few for subclusters")
    needed = -(-size >> (2 * cluster_bits - entry_bits))
    if needed > l1_entries:
        problem = f"its L1 table has {l1_entries} entries, and its {format_size(size)} need {needed}"
        raise damaged(problem)
