"""What a file looks like: which format, even one that no driver serves, and what to do about that.

Must not decide how a file is served: a guest can write anything to its disk. What a file looks like is a hint for
people and for `image info`, and nothing else may use it.

Sources: the formats' own specifications, QEMU's ``block/*.c`` for the magic of each, and file(1).
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from xenbackend.block import grammar
from xenbackend.block.formats.common import Read
from xenbackend.block.formats.table import FORMATS
from xenbackend.errors import DriverError, printable

_START = 1024  # bytes
_DESCRIPTOR = 64 << 10  # bytes of a text that are searched for "version="
_ISO_AT, _TAR_AT = 32768, 257  # offsets of their magic
_TAR_SUM = slice(148, 156)  # the checksum, which is all that identifies the oldest kind of tar
_QEMU = "qemu-img convert -f {name} -O qcow2 {file} {new} makes an image of it that {layer} serves"
_TEXT = "its descriptor, the small text file beside it"
_LUKS = (
    "luks:key=KEYFILE|{raw} serves it, where KEYFILE has its passphrase; a guest that unlocks it itself is given {raw}"
)
_PACKED = "if it contains an image, extract it with {command}"


@dataclass(frozen=True, slots=True)
class Look:
    """What a file looks like. `advice` is a sentence; empty if nothing needs to be said but the driver."""

    name: str  # one word: "qcow2", "raw", "qed"
    title: str  # such as "a QED image"
    driver: str = ""  # the driver that serves it; empty if none does
    advice: str = ""


@dataclass(frozen=True, slots=True)
class _Kind:
    title: str
    driver: str = ""
    advice: str = ""
    command: str = ""  # unpacks it


_KINDS = {
    **{each.name: _Kind(each.look, each.driver) for each in FORMATS.values()},
    "ova": _Kind("an OVA, an appliance with its disks", "vmdk"),
    "iso": _Kind("an ISO 9660 image, the content of a CD", "aio", "as a disk it can only be read: attach it read-only"),
    "cowd": _Kind("a sparse extent of ESX (COWD), a part of a VMDK disk", advice=f"vmdk: serves the disk by {_TEXT}"),
    "sesparse": _Kind(
        "a sparse extent of ESXi (SE sparse), a part of a VMDK disk",
        advice=f"qemu-img convert -f vmdk -O qcow2 makes one file of the disk, given {_TEXT}",
    ),
    "luks": _Kind("a LUKS container (encrypted)", advice=_LUKS),
    "qed": _Kind("a QED image", advice=_QEMU),
    "parallels": _Kind("a Parallels image", advice=_QEMU),
    "bochs": _Kind("a Bochs image", advice=_QEMU),
    "cloop": _Kind("a cloop image", advice=_QEMU),
    "dmg": _Kind("a DMG image of macOS", advice=_QEMU),
    "tar": _Kind("a tar archive", advice=_PACKED, command="tar -xf {file}"),
    "gzip": _Kind("a file compressed by gzip", advice=_PACKED, command="gunzip -c {file} > {unpacked}"),
    "bzip2": _Kind("a file compressed by bzip2", advice=_PACKED, command="bunzip2 -c {file} > {unpacked}"),
    "xz": _Kind("a file compressed by xz", advice=_PACKED, command="unxz -c {file} > {unpacked}"),
    "zstd": _Kind("a file compressed by zstd", advice=_PACKED, command="unzstd -c {file} > {unpacked}"),
    "lz4": _Kind("a file compressed by lz4", advice=_PACKED, command="unlz4 -c {file} > {unpacked}"),
    "zip": _Kind("a ZIP archive", advice=_PACKED, command="unzip {file}"),
    "7z": _Kind("a 7z archive", advice=_PACKED, command="7z x {file}"),
}
_MAGIC = (  # offset, magic, and name of the format
    *sorted(((*each.magic, each.name) for each in FORMATS.values() if each.magic[1]), key=lambda row: -len(row[1])),
    (0, b"COWD", "cowd"),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", "sesparse"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"PK\3\4", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
)


def look_at(path: str) -> Look:
    """Return what a file or block device looks like. Raises: DriverError if it is neither, or cannot be read."""
    fd = open_to_look(path)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        name = name_of(reader(fd, size), size)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(fd)
    kind = _KINDS[name]
    return Look(name, kind.title, kind.driver, _advice(name, kind, path))


def hint_for(path: str) -> str:
    """Return advice on what to write for a file that was given without a driver."""
    try:
        look = look_at(path)
    except DriverError:
        return f"write the driver before it, as in qcow2:{printable(path)}"
    if not look.driver:
        return f"it looks like {look.title}, which no driver serves; {look.advice}"
    note = f"; {look.advice}" if look.advice else ""
    return f"write {layer_of(look, path)} if that is what it is: it looks like {look.title}{note}"


def layer_of(look: Look, path: str) -> str:
    """Return the layer that serves a file, empty if no driver does."""
    return grammar.format_file(look.driver, path) if look.driver else ""


def open_to_look(path: str) -> int:
    """Open a file or block device without a lock. Raises: DriverError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else opening a pipe would wait for a writer
    except OSError as error:
        raise _unreadable(path, error) from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise DriverError(f"{printable(path)} is neither a file nor a block device", path=path)
    return fd


def reader(fd: int, size: int) -> Read:
    """Return a function that reads from a file of `size` bytes, and returns no bytes for an offset outside the file."""

    def read(offset: int, length: int) -> bytes:
        try:
            return os.pread(fd, length, offset) if 0 <= offset < size else b""
        except OSError as error:
            raise OSError(error.errno, f"read of {length} bytes at {offset}: {error.strerror}") from error

    return read


def name_of(read: Read, size: int) -> str:
    """Return the name of the format that a file of `size` bytes looks like; "raw" if it looks like no other one."""
    start = read(0, _START)
    end = read(max(0, size - 512), 512)
    if end.startswith(FORMATS["vhd"].magic[1]) and not start.startswith(FORMATS["qcow2"].magic[1]):
        return "vhd"  # a fixed VHD begins with the guest's data
    if name := _name_by_start(start):
        return name
    if start[_TAR_AT:].startswith(b"ustar") or start[_TAR_SUM].strip(b"\0 ").isdigit():
        name = _name_of_archive(read, start, size)
    elif end.startswith(b"koly"):
        name = "dmg"
    elif read(_ISO_AT + 1, 5) == b"CD001":
        name = "iso"
    elif _is_descriptor(read, start, size):
        name = "vmdk"
    return name or "raw"


def _name_by_start(start: bytes) -> str:
    if start.startswith(b"BZh") and start[4:10] == b"1AY&SY":
        return "bzip2"
    return next((name for place, magic, name in _MAGIC if start.startswith(magic, place)), "")


def _name_of_archive(read: Read, start: bytes, size: int) -> str:
    """Return the name of the archive format of a file, empty if it is not an archive."""
    from xenbackend.block.formats.ova import is_archive, members

    if not is_archive(start):
        return "tar" if start[_TAR_AT:].startswith(b"ustar") else ""
    try:
        return "ova" if any(each.name.lower().endswith(".ovf") for each in members(read, size)) else "tar"
    except DriverError:
        return "tar"


def _is_descriptor(read: Read, start: bytes, size: int) -> bool:
    if not start[:1].isspace() and start[:1] not in (b"#", b"v", b"V"):
        return False
    from xenbackend.block.formats.vmdk_descriptor import MAX_LENGTH, is_descriptor

    return size <= MAX_LENGTH and is_descriptor(read(0, _DESCRIPTOR))


def _advice(name: str, kind: _Kind, path: str) -> str:
    if not kind.advice:
        return ""
    import shlex  # late: most files are served

    new = f"{os.path.splitext(path)[0]}.qcow2"  # noqa: PTH122 - as `opening`: pathlib would alter the name
    file = shlex.quote(printable(path))
    return kind.advice.format(
        name=name,
        file=file,
        new=shlex.quote(printable(new)),
        layer=printable(grammar.format_file(FORMATS["qcow2"].driver, new)),
        raw=printable(grammar.format_file(FORMATS["raw"].driver, path)),
        command=kind.command.format(file=file, unpacked=shlex.quote(printable(_unpacked(path)))),
    )


def _unpacked(path: str) -> str:
    """Return a file name for the content of a compressed file."""
    name, suffix = os.path.splitext(path)  # noqa: PTH122 - as above
    return name if suffix in (".gz", ".bz2", ".xz", ".zst", ".lz4") else f"{path}.unpacked"


def _unreadable(path: str, error: OSError) -> DriverError:
    return DriverError(f"{printable(path)}: {error.strerror}", path=path, errno=error.errno or errno.EIO)
