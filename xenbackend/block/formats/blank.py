"""New images without data: the bytes of each format.

Sources: QEMU, ``docs/interop/qcow2.txt`` and ``block/qcow.c``; "Virtual Hard Disk Image Format Specification", version
1.0 (Microsoft, 2006). Must not open a file, nor choose how a parent is named.
"""

from __future__ import annotations

import os
import re
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from xenbackend.block.formats import qcow2, vhd
from xenbackend.block.formats.qcow2_tables import pack_refcounts, pack_table, refcount_clusters
from xenbackend.block.formats.table import FORMATS, load
from xenbackend.block.formats.vhd_names import parent_names
from xenbackend.errors import ConfigError, printable
from xenbackend.units import PAGE, SECTOR, format_size, round_up

# Only for creators that they know do QEMU and blktap take the disk's size from the footer, and not from the geometry.
# For version 1.1 of this creator they do not look for a map of full blocks, which a new image does not have.
_VHD_CREATOR, _VHD_CREATOR_VERSION = b"tap\0", 0x00010001
_QCOW2_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_QCOW_HEADER = struct.Struct(">4sIQIIQBBHIQ")
REFCOUNT_ORDER = 4
_PROTOCOL = re.compile(rb"[A-Za-z0-9+.-]+:")


@dataclass(frozen=True, slots=True)
class Blank:
    """The content of a new file: pieces as (place, bytes), and holes around them."""

    size: int  # bytes
    pieces: Sequence[tuple[int, bytes]] = field(default=())


@dataclass(frozen=True, slots=True)
class Wishes:
    """The choices for a new image. Sizes are in bytes; 0 is the format's default."""

    cluster_size: int = 0  # for VHD: of a block
    is_fixed: bool = False  # VHD only


@dataclass(frozen=True, slots=True)
class Parent:
    """How a new image names its parent."""

    name: str  # as it will be written into the image
    format: str  # a key of FORMATS
    qemu_format: str
    uuid: bytes = bytes(16)  # of a VHD parent
    mtime: float = 0.0  # of the parent's file, in seconds since 1970


def blank(image_format: str, size: int, wishes: Wishes, parent: Parent | None) -> Blank:
    """Return a new image. Raises: ConfigError if the format does not support the wishes."""
    if size <= 0 or size % SECTOR:
        raise ConfigError(f"a disk of {size} bytes is not possible; choose a multiple of 512")
    row = FORMATS[image_format]
    if wishes.is_fixed and (not row.can_be_fixed or parent):
        raise ConfigError("only a VHD image without a parent can be fixed")
    make: Callable[[int, Wishes, Parent | None], Blank] = load(row.blank)
    return make(size, replace(wishes, cluster_size=wishes.cluster_size or row.cluster_size), parent)


def blank_raw(size: int, wishes: Wishes, parent: Parent | None) -> Blank:
    """Return a raw image. Raises: ConfigError."""
    if parent or wishes.cluster_size:
        raise ConfigError("a raw image has neither clusters nor a parent; choose qcow2 or vhd")
    return Blank(size)


def blank_qcow2(size: int, wishes: Wishes, parent: Parent | None) -> Blank:
    """Return a QCOW2 image of version 3. Raises: ConfigError."""
    bits = _cluster_bits(wishes.cluster_size, qcow2.MIN_CLUSTER_BITS, qcow2.MAX_CLUSTER_BITS)
    cluster = 1 << bits
    l1_entries = max(1, -(-size >> 2 * bits - 3))
    if l1_entries * 8 > qcow2.MAX_L1_BYTES:
        raise ConfigError(f"{format_size(size)} is too much for clusters of {format_size(cluster)}; choose larger ones")
    l1_clusters = -(-l1_entries * 8 >> bits)
    table_clusters, blocks = _refcount_clusters(l1_clusters, cluster, -(-size >> bits))
    name = qcow_name(parent)
    extensions = qcow2.pack_extension(qcow2.BACKING_FORMAT, parent.qemu_format.encode()) if parent else b""
    extensions += qcow2.pack_extension(0, b"")
    backing = _QCOW2_HEADER.size + len(extensions)
    _check_room(name, cluster - backing)
    l1 = (1 + table_clusters + blocks) * cluster
    header = _QCOW2_HEADER.pack(
        qcow2.MAGIC, 3, backing if name else 0, len(name), bits, size, 0, l1_entries, l1, cluster, table_clusters,
        0, 0, 0, 0, 0, REFCOUNT_ORDER, _QCOW2_HEADER.size,
    )  # fmt: skip
    places = [(1 + table_clusters + index) * cluster for index in range(blocks)]
    used = 1 + table_clusters + blocks + l1_clusters
    pieces = [(0, header + extensions + name), (cluster, pack_table(array("Q", places)))]
    pieces.append((places[0], pack_refcounts(array("H", [1]) * used, REFCOUNT_ORDER)))  # the blocks are neighbours
    return Blank(used * cluster, pieces)


def blank_qcow(size: int, wishes: Wishes, parent: Parent | None) -> Blank:
    """Return a QCOW image of version 1. Raises: ConfigError."""
    bits = _cluster_bits(wishes.cluster_size, 9, 16)
    l2_bits = qcow_l2_bits(1 << bits)
    name = qcow_name(parent)
    l1 = round_up(_QCOW_HEADER.size + len(name), 8)
    l1_bytes = -(-size >> bits + l2_bits) * 8
    if l1_bytes > qcow2.MAX_L1_BYTES:
        problem = f"{format_size(size)} is too much for clusters of {format_size(1 << bits)} in this format"
        raise ConfigError(f"{problem}; choose larger ones, or qcow2")
    _check_room(name, qcow2.MAX_NAME)
    header = _QCOW_HEADER.pack(
        qcow2.MAGIC, 1, _QCOW_HEADER.size if name else 0, len(name), int(time.time()), size, bits, l2_bits, 0, 0, l1
    )
    return Blank(round_up(l1 + l1_bytes, max(1 << bits, SECTOR)), [(0, header + name)])


def qcow_l2_bits(cluster_size: int) -> int:
    """Return the power of two of the entries of an L2 table of QCOW, version 1: as QEMU chooses it."""
    return 12 if cluster_size == SECTOR else 9


def blank_vhd(size: int, wishes: Wishes, parent: Parent | None) -> Blank:
    """Return a VHD image: dynamic or fixed, or differencing if it has a parent. Raises: ConfigError."""
    import uuid  # late: the import is slow, and only new images need it

    vhd.check_new_size(size)
    kind = vhd.FIXED if wishes.is_fixed else vhd.DIFFERENCING if parent else vhd.DYNAMIC
    footer = vhd.Footer(
        kind, size, size, vhd.geometry_of(size), uuid.uuid4().bytes, vhd.NO_OFFSET if wishes.is_fixed else SECTOR,
        _vhd_time(time.time()), _VHD_CREATOR, _VHD_CREATOR_VERSION,
    )  # fmt: skip
    packed = vhd.pack_footer(footer)
    if wishes.is_fixed:
        return Blank(size + SECTOR, [(size, packed)])
    block = 1 << _cluster_bits(wishes.cluster_size, 12, vhd.MAX_NEW_BLOCK.bit_length() - 1)
    entries = -(-size // block)
    if entries > vhd.MAX_ENTRIES:
        raise ConfigError(f"{format_size(size)} is too much for blocks of {format_size(block)}; choose larger ones")
    table_at = 3 * SECTOR
    names_at = table_at + round_up(4 * entries, SECTOR)
    header, written = vhd_with_parent(vhd.Header(table_at, entries, block), names_at, parent)
    table = b"\xff" * round_up(4 * entries, SECTOR)
    end = round_up(names_at + len(written) + SECTOR, PAGE)  # so that direct I/O can reach all of it
    front = packed + vhd.pack_header(header) + table + written
    return Blank(end, [(0, front), (end - SECTOR, packed)])


def vhd_with_parent(header: vhd.Header, place: int, parent: Parent | None) -> tuple[vhd.Header, bytes]:
    """Return a VHD's header with another parent, or none, and the parent's names to be written at `place` of the file.

    Raises: ConfigError if a name could not be read back.
    """
    if parent is None:
        return replace(header, parent_uuid=bytes(16), parent_timestamp=0, parent_name=b"", locators=()), b""
    locators, written = _locators(parent.name, place)
    header = replace(
        header,
        parent_uuid=parent.uuid,
        parent_timestamp=_vhd_time(parent.mtime),
        parent_name=_name(parent.name),
        locators=locators,
    )
    _check_readable(parent.name, header, written, place)
    return header, written


def _cluster_bits(size: int, least: int, most: int) -> int:
    bits = size.bit_length() - 1
    if size != 1 << bits or not least <= bits <= most:
        limits = f"from {format_size(1 << least)} to {format_size(1 << most)}"
        raise ConfigError(f"clusters of {format_size(size)} are not possible; choose a power of two {limits}")
    return bits


def _refcount_clusters(others: int, cluster: int, disk: int) -> tuple[int, int]:
    """Return how many clusters the refcount table and the blocks take to count themselves, the header and `others`.

    The table has room for the clusters of a full disk, so that it need not move while the disk is filled.
    """
    full, _ = refcount_clusters(1 + others + disk + disk // (cluster // 8), cluster, REFCOUNT_ORDER)
    table, blocks = min(full, qcow2.MAX_REFCOUNT_TABLE_BYTES // cluster), 1
    while blocks * (cluster // 2) < 1 + table + blocks + others:
        blocks += 1
    return table, blocks


def qcow_name(parent: Parent | None) -> bytes:
    """Return the name of a parent in QCOW, changed if it looks like a protocol (`nbd:`) and not like a file."""
    name = os.fsencode(parent.name) if parent else b""
    return b"./" + name if _PROTOCOL.match(name) else name


def _check_room(name: bytes, room: int) -> None:
    """Refuse a parent's name that does not fit into QCOW's header. Raises: ConfigError."""
    if len(name) > min(room, qcow2.MAX_NAME):
        raise ConfigError(f"the parent's name has {len(name)} bytes, too many for the image's header")


def _check_readable(name: str, header: vhd.Header, written: bytes, place: int) -> None:
    """Refuse a parent's name that could not be read back. Raises: ConfigError."""

    def read(offset: int, length: int) -> bytes:
        return written[offset - place : offset - place + length]

    found = parent_names(read, header, place + len(written))
    if not {name, f"./{name}"} & set(found):
        problem = f"a VHD image cannot name its parent {printable(name)}, as names in it must be Unicode text"
        raise ConfigError(f"{problem}; rename the parent, or make a qcow2 image")


def _locators(name: str, place: int) -> tuple[tuple[vhd.Locator, ...], bytes]:
    r"""Return the parent's name in the forms of Windows, blktap and macOS; relative ones begin with ``.\``, ``./``."""
    is_absolute = name.startswith("/")
    unix = name if is_absolute else f"./{name}"
    windows = unix.replace("/", "\\").encode("utf-16-le", "surrogatepass")
    codes = {b"MacX": f"file://{unix}".encode(errors="surrogateescape"), b"W2ku": windows, b"W2ru": windows}
    found, written = [], b""
    for code, data in codes.items():
        if is_absolute and code == b"W2ru":
            continue
        space = round_up(len(data), SECTOR)
        found.append(vhd.Locator(code, space, len(data), place + len(written)))
        written += data.ljust(space, b"\0")
    return tuple(found), written


def _name(name: str) -> bytes:
    data = os.path.basename(name).encode("utf-16-be", "surrogatepass")  # noqa: PTH119 - pathlib would alter the name
    return data[:510]


def _vhd_time(seconds: float) -> int:
    return max(0, int(seconds) - vhd.EPOCH) & 0xFFFFFFFF
