"""OVA files: a tar archive with a description (OVF) and the disks that it names.

Sources: POSIX, ``pax``, "ustar Interchange Format" and "pax Header Block"; GNU tar, "Basic Tar Format" (long names,
numbers in base 256); DMTF DSP0243, "Open Virtualization Format", ``References`` and ``DiskSection``. Must not open a
file, nor read the content of a member other than the description: an archive may claim to have any number of members
of any size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xenbackend.block.formats.common import Read
from xenbackend.errors import DriverError, printable
from xenbackend.units import round_up

MAX_MEMBERS = 4096
_MAX_TEXT = 4 << 20  # bytes of a description
_MAX_HEADER = 64 << 10  # bytes of a header that has the name or size for the next one
_MAX_NAME = 4096  # bytes
_BLOCK = 512
_FILE, _LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL, _SPARSE = b"0", b"L", b"K", b"x", b"g", b"S"
_PLAIN = (_FILE, b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes: whatever their size says
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]{1,255})=")


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive. `offset` and `length` are in bytes."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Described:
    """A disk's file in the description."""

    name: str
    compression: str  # empty if it is not compressed
    is_chunked: bool  # split into several members


def is_archive(start: bytes) -> bool:
    """Return whether a file that begins like this is a tar archive."""
    return len(start) >= _BLOCK and _has_checksum(start[:_BLOCK])


def members(read: Read, file_size: int) -> Iterator[Member]:
    """Yield the files of an archive in order; other members are skipped.

    Raises: DriverError if a header is damaged, or if there are more than MAX_MEMBERS.
    """
    place, more = 0, _Override()
    for _ in range(MAX_MEMBERS):
        block = read(place, _BLOCK)
        if len(block) < _BLOCK or not any(block):
            return
        kind, length, data = block[156:157], _length(block, more, place), place + _BLOCK
        if not 0 <= length <= file_size - data:
            raise _damaged(f"a member at byte {place} of the archive has {length} bytes, but the file ends earlier")
        if kind in _HEADERS:
            if length > _MAX_HEADER:
                raise _damaged(f"a header at byte {place} of the archive has {length} bytes")
            more = _HEADERS[kind](more, read(data, length))
        else:
            if kind in _PLAIN:
                yield Member(more.name or _name(block), data, length)
            elif kind == _SPARSE:
                raise DriverError(f"{printable(_name(block))} is in it as a sparse member; unpack it with tar -xf")
            more = _Override()
        place = data + round_up(length, _BLOCK)
    raise DriverError(f"the archive has more than {MAX_MEMBERS} members; unpack it with tar -xf")


def find_disk(read: Read, file_size: int, wanted: str) -> Member:
    """Return the disk of an OVA.

    Args:
        read: reads the file.
        file_size: bytes of the file.
        wanted: the name of the disk's file in it; may be empty if there is only one disk.

    Raises: DriverError if it is no OVA, if it has no such disk, if it has several and `wanted` is empty, or if the disk
        is compressed or split.
    """
    files = {each.name: each for each in members(read, file_size)}
    texts = [each for each in files.values() if each.name.lower().endswith(".ovf")]
    if not texts:
        raise DriverError("it is a tar archive, but not an OVA: there is no .ovf in it; unpack it with tar -xf")
    if texts[0].length > _MAX_TEXT:
        raise _damaged(f"its description {printable(texts[0].name)} has {texts[0].length} bytes")
    disks = described_disks(read(texts[0].offset, texts[0].length))
    disk = _choose(disks, wanted)
    name = printable(disk.name)
    if disk.compression:
        raise DriverError(
            f"its disk {name} is compressed by {printable(disk.compression)}; unpack it with tar and gunzip"
        )
    if disk.is_chunked:
        raise DriverError(f"its disk {name} is in several chunks; unpack it with tar -xf and join them with cat")
    if disk.name not in files:
        raise _damaged(f"its description names the disk {name}, which is not in the archive")
    return files[disk.name]


def described_disks(text: bytes) -> list[Described]:
    """Return the disks in a description, in its order. Raises: DriverError if it cannot be parsed."""
    from xml.parsers import expat  # late: most disks are not in an OVA

    found: dict[str, list[dict[str, str]]] = {"File": [], "Disk": []}

    def start(name: str, attributes: dict[str, str]) -> None:
        kept = found.get(name.rpartition(" ")[2])
        if kept is not None:
            kept.append({key.rpartition(" ")[2]: value for key, value in attributes.items()})

    def refuse(*_: object) -> None:  # entities can expand a few lines to gigabytes, and no OVF needs any
        raise DriverError("its description has a document type (DTD), which is refused")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise _damaged(f"its description cannot be read: {error}") from error
    files = {each.get("id", ""): each for each in found["File"]}
    named = [files[each["fileRef"]] for each in found["Disk"] if each.get("fileRef") in files]
    unique = {each.get("href", ""): each for each in named}
    return [Described(name, _compression(each), "chunkSize" in each) for name, each in unique.items()]


def _compression(file: dict[str, str]) -> str:
    said = file.get("compression", "")
    return "" if said == "identity" else said


def _choose(disks: Sequence[Described], wanted: str) -> Described:
    names = ", ".join(printable(each.name) for each in disks)
    if not disks:
        raise DriverError("its description names no disk")
    if not wanted:
        if len(disks) > 1:
            raise DriverError(f"it has {len(disks)} disks; choose one with disk=NAME: {names}")
        return disks[0]
    for each in disks:
        if each.name == wanted:
            return each
    raise DriverError(f"it has no disk {printable(wanted)}; its disks are {names}")


@dataclass(frozen=True, slots=True)
class _Override:
    """The name and size of a member as given by the headers before its own."""

    name: str = ""
    size: int | None = None


def _long_name(more: _Override, data: bytes) -> _Override:
    return _Override(_text(data.partition(b"\0")[0]), more.size)


def _pax(more: _Override, data: bytes) -> _Override:
    """Apply a pax header: records of a length, which is that of the whole record, a key and a value."""
    name, size, place = more.name, more.size, 0
    while match := _PAX_RECORD.match(data, place):
        end = place + int(match[1])
        value = data[match.end() : end - 1]
        if end <= match.end() or end > len(data):
            break
        if match[2] == b"path":
            name = _text(value)
        elif match[2] == b"size":
            size = int(value) if value.isdigit() and len(value) < 20 else -1
        elif match[2].startswith(b"GNU.sparse"):
            raise DriverError("a member of the archive is sparse; unpack it with tar -xf")
        place = end
    return _Override(name, size)


def _nothing(more: _Override, _: bytes) -> _Override:
    return more


_HEADERS: dict[bytes, Callable[[_Override, bytes], _Override]] = {
    _LONG_NAME: _long_name, _LONG_LINK: _nothing, _PAX: _pax, _PAX_FOR_ALL: _nothing,
}  # fmt: skip


def _damaged(problem: str) -> DriverError:
    return DriverError(f"it is damaged: {problem}; tar -tvf shows what is left of it")


def _length(block: bytes, more: _Override, place: int) -> int:
    """Return the number of bytes that follow a header. Raises: DriverError."""
    if not _has_checksum(block):
        raise _damaged(f"the archive's header at byte {place} has a wrong checksum")
    kind = block[156:157]
    if kind in _WITHOUT_DATA:
        return 0
    if more.size is not None and kind not in _HEADERS:
        return more.size
    return _number(block[124:136], place)


def _has_checksum(block: bytes) -> bool:
    """Return whether a header's checksum is right, which is the sum of its bytes with the checksum itself as spaces."""
    said = block[148:156].strip(b"\0 ")
    return said.isdigit() and not said.strip(b"01234567") and int(said, 8) == sum(block[:148] + b" " * 8 + block[156:])


def _number(field: bytes, place: int) -> int:
    """Parse a number: octal digits, or base 256 after a byte of 0x80."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.strip(b"\0 ")
    if digits.strip(b"01234567"):
        raise _damaged(f"the archive's header at byte {place} has a size that is not a number")
    return int(digits, 8) if digits else 0


def _name(block: bytes) -> str:
    name, prefix = (field.partition(b"\0")[0] for field in (block[:100], block[345:500]))
    return _text(prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name)


def _text(name: bytes) -> str:
    if len(name) > _MAX_NAME:
        raise _damaged(f"a member of the archive has a name of {len(name)} bytes")
    return name.decode("utf-8", "surrogateescape").removeprefix("./")
