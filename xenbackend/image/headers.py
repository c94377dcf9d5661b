"""Reads sizes and names from the headers of an image, even if the image cannot be opened.

Must not judge: a damaged header only gives fewer facts; opening the image reports what is wrong. Nothing that is read
here is used to read a disk.

Sources: as the modules of `block.formats`; QEMU, ``docs/interop/qed_spec.rst``, ``docs/interop/parallels.rst``,
``block/vmdk.c``, ``block/dmg.c``; ISO 9660 8.4; LUKS on-disk formats, versions 1 and 2; [MS-VHDX] 2.2.4 and 2.6.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from xenbackend.block.formats.common import Read
from xenbackend.block.formats.table import FORMATS
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR

_MAX_NAME = 8192  # bytes of a parent's name
_QCOW2_FEATURES = {0: "dirty", 1: "corrupt", 2: "external data file", 3: "compression type", 4: "extended L2 entries"}
_CRYPT = {0: "", 1: "AES", 2: "LUKS"}


@dataclass(frozen=True, slots=True)
class Headers:
    """The facts in the headers. Sizes are in bytes; 0 if not known."""

    format: str  # such as "QCOW2, version 3"
    size: int = 0  # of the disk
    cluster_size: int = 0
    parents: tuple[str, ...] = ()  # the names that the image has for its parent
    more: dict[str, str] = field(default_factory=dict)


def read_headers(name: str, read: Read, file_size: int) -> Headers:
    """Return the facts in the headers of a file that looks like format `name` (`looks.name_of`). Raises: OSError."""
    try:
        return _READERS[name](read, file_size) if name in _READERS else Headers(name)
    except (DriverError, struct.error, ValueError, KeyError):
        return Headers(_TITLES.get(name, name))


def _at(kind: str, read: Read, offset: int) -> tuple[int, ...]:
    return struct.unpack(kind, read(offset, struct.calcsize(kind)))


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _qcow2(read: Read, _: int) -> Headers:
    version, backing_at, backing_length, bits, size, crypt = _at(">IQIIQI", read, 4)
    (snapshots,) = _at(">I", read, 60)
    parents = (_text(read(backing_at, min(backing_length, _MAX_NAME))),) if backing_at and backing_length else ()
    more = {"snapshots": str(snapshots)} if snapshots else {}
    if crypt:
        more["encryption"] = _CRYPT.get(crypt, f"method {crypt}")
    if version >= 3:
        (incompatible, _, _) = _at(">QQQ", read, 72)
        bits_set = [bit for bit in range(64) if incompatible >> bit & 1]
        if bits_set:
            more["features"] = ", ".join(_QCOW2_FEATURES.get(bit, f"number {bit}, unknown") for bit in bits_set)
    cluster_size = 1 << bits if 9 <= bits <= 21 else 0
    return Headers(f"QCOW2, version {version}", size, cluster_size, parents, more)


def _qcow(read: Read, _: int) -> Headers:
    backing_at, backing_length, _, size, bits, _, _, crypt = _at(">QIIQBBHI", read, 8)
    parents = (_text(read(backing_at, min(backing_length, _MAX_NAME))),) if backing_at and backing_length else ()
    more = {"encryption": _CRYPT.get(crypt, f"method {crypt}")} if crypt else {}
    return Headers("QCOW, version 1", size, 1 << bits if 9 <= bits <= 21 else 0, parents, more)


def _vhd(read: Read, file_size: int) -> Headers:
    from xenbackend.block.formats import vhd
    from xenbackend.block.formats.vhd_names import parent_names

    footer, _ = vhd.read_footer(read, file_size)
    title = vhd.title_of(footer)
    if footer.type == vhd.FIXED:
        return Headers(title, footer.size)
    try:
        header = vhd.read_header(read, footer, file_size)
        names = parent_names(read, header, file_size) if footer.type == vhd.DIFFERENCING else []
    except DriverError:
        return Headers(title, footer.size)
    return Headers(title, footer.size, header.block_size, tuple(names))


def _vhdx(read: Read, file_size: int) -> Headers:
    from xenbackend.block.formats import vhdx

    regions = {each[:16]: struct.unpack("<QI", each[16:28]) for each in _entries(read(192 << 10, 64 << 10), 16, 8)}
    place, _ = regions[vhdx.METADATA]
    table = read(place, 64 << 10)
    items = {each[:16]: struct.unpack("<II", each[16:24]) for each in _entries(table, 32, 10)}

    def item(guid: bytes, most: int) -> bytes:
        offset, length = items.get(guid, (0, 0))
        return read(place + offset, min(length, most)) if offset and place + offset < file_size else b""

    (size,) = struct.unpack("<Q", item(vhdx.DISK_SIZE, 8))
    block_size, flags = struct.unpack("<II", item(vhdx.PARAMETERS, 8))
    locator = item(vhdx.PARENT_LOCATOR, 64 << 10) if flags & 2 else b""
    kind = "differencing" if flags & 2 else "fixed" if flags & 1 else "dynamic"
    return Headers(f"VHDX, {kind}", size, block_size, _vhdx_parents(locator))


def _entries(table: bytes, first: int, count_at: int) -> list[bytes]:
    """Return the entries of a VHDX table, 32 bytes each from `first` on; their number is in two bytes at `count_at`."""
    count = int.from_bytes(table[count_at : count_at + 2], "little")
    return [table[place : place + 32] for place in range(first, min(first + 32 * count, len(table) - 31), 32)]


def _vhdx_parents(locator: bytes) -> tuple[str, ...]:
    """Return the paths in a parent locator, which has offset and length of each key and value ([MS-VHDX] 2.6.2.6)."""
    names = []
    count = int.from_bytes(locator[18:20], "little")
    for place in range(20, min(20 + 12 * count, len(locator) - 11), 12):
        key_at, value_at, key_length, value_length = struct.unpack_from("<IIHH", locator, place)
        key, value = (
            locator[at : at + length].decode("utf-16-le", "replace")
            for at, length in ((key_at, key_length), (value_at, value_length))
        )
        if key.endswith("_path"):
            names.append(value)
    return tuple(names)


def _vdi(read: Read, _: int) -> Headers:
    (kind,) = _at("<I", read, 76)
    size, block_size = _at("<QI", read, 368)
    kinds = {1: "dynamic", 2: "fixed", 3: "undo", 4: "differencing"}
    return Headers(f"VDI, {kinds.get(kind, f'type {kind}')}", size, block_size)


def _vmdk(read: Read, file_size: int) -> Headers:
    from xenbackend.block.formats import vmdk_descriptor

    size, grain = 0, 0
    if read(0, 4) == b"KDMV":
        capacity, grain, text_at, text_length = _at("<QQQQ", read, 12)
        size = capacity * SECTOR
        text = read(text_at * SECTOR, min(text_length * SECTOR, vmdk_descriptor.MAX_LENGTH)) if text_at else b""
    else:
        text = read(0, min(file_size, vmdk_descriptor.MAX_LENGTH))
    found = vmdk_descriptor.parse(text)
    names = [each.name for each in found.extents if each.name]
    more = {"files": ", ".join(map(_text, names[:8])) + (", ..." if len(names) > 8 else "")} if not size else {}
    parents = (_text(found.parent),) if found.parent_cid != vmdk_descriptor.NO_PARENT else ()
    kind = f"VMDK, {found.create_type}" if found.create_type else "VMDK"
    return Headers(kind, size or found.size, grain * SECTOR, parents, more)


def _ova(read: Read, file_size: int) -> Headers:
    from xenbackend.block.formats.ova import members

    files = [each for each in members(read, file_size) if not each.name.lower().endswith((".ovf", ".mf", ".cert"))]
    return Headers("OVA", more={"files": ", ".join(each.name for each in files[:16])})


def _qed(read: Read, _: int) -> Headers:
    (cluster_size,) = _at("<I", read, 4)
    (features,) = _at("<Q", read, 16)
    size, backing_at, backing_length = _at("<QII", read, 48)
    has_parent = features & 1 and backing_at
    parents = (_text(read(backing_at, min(backing_length, _MAX_NAME))),) if has_parent else ()
    return Headers("QED", size, cluster_size, parents)


def _parallels(read: Read, _: int) -> Headers:
    (cluster,) = _at("<I", read, 28)
    (sectors,) = _at("<Q", read, 36)
    if read(0, 16) == b"WithoutFreeSpace":
        sectors &= 0xFFFFFFFF
    return Headers("Parallels", sectors * SECTOR, cluster * SECTOR)


def _luks(read: Read, file_size: int) -> Headers:
    (version,) = _at(">H", read, 6)
    if version != 1:
        return Headers(f"LUKS, version {version}")
    (payload,) = _at(">I", read, 104)
    return Headers("LUKS, version 1", max(0, file_size - payload * SECTOR))


def _cowd(read: Read, _: int) -> Headers:
    sectors, grain = _at("<II", read, 12)
    return Headers("VMDK extent, COWD", sectors * SECTOR, grain * SECTOR)


def _sesparse(read: Read, _: int) -> Headers:
    sectors, grain = _at("<QQ", read, 16)
    return Headers("VMDK extent, SE sparse", sectors * SECTOR, grain * SECTOR)


def _dmg(read: Read, file_size: int) -> Headers:
    (sectors,) = _at(">Q", read, file_size - 512 + 492)
    return Headers("DMG", sectors * SECTOR)


_READERS: dict[str, Callable[[Read, int], Headers]] = {
    "qcow2": _qcow2, "qcow": _qcow, "vhd": _vhd, "vhdx": _vhdx, "vdi": _vdi, "vmdk": _vmdk, "ova": _ova, "qed": _qed,
    "parallels": _parallels, "luks": _luks, "cowd": _cowd, "sesparse": _sesparse, "dmg": _dmg,
}  # fmt: skip
_TITLES = {each.name: each.title for each in FORMATS.values()} | {"qed": "QED"}
