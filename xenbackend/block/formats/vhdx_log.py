"""The log of a VHDX image: bytes to the changes that its last user had not yet applied to their places.

Source: Microsoft, [MS-VHDX] 2.3. The log is a ring of entries. Each entry has a number that is one more than that of
the entry before it, and descriptors of what was to be written where. It also says where the oldest entry is that was
not applied when it was written: the entries from there to itself are a sequence. Only the newest complete sequence
counts; an entry that was torn, or is from an earlier use of the log, ends a sequence.

Must not read outside the log, nor take a length, a place or a count from it without checking it. The time for that is
bounded, too, even if entries overlap.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from xenbackend.block.formats.common import Read, damaged
from xenbackend.block.formats.crc32c import crc32c
from xenbackend.block.mapped.changed import Change, Changes
from xenbackend.errors import DriverError
from xenbackend.units import format_size

_MIB = 1 << 20
MAX_LOG = 64 * _MIB  # bytes; Hyper-V and QEMU make logs of 1 MiB
_MAX_DESCRIPTORS = 1 << 16  # of a sequence; the log of 1 MiB has room for 32,752
_MAX_END = 128 << 40  # bytes: the largest end of a change or of the file; a disk has up to 64 TiB
_MAX_LOOKS = 4  # times the log's size may be checked: entries that do not overlap are checked once
_SECTOR = 4096  # bytes: the unit of entries, and the data of one descriptor
_HEADERS_END = 192 << 10  # bytes: a log never changes anything before this
_ENTRY = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR = struct.Struct("<4s4s8sQQ")


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of a replay."""

    changes: Changes
    size: int  # the file's size in bytes, with the changes
    entries: int  # number of log entries that were replayed


@dataclass(frozen=True, slots=True)
class _Entry:
    """A complete entry: its signature, identity, descriptors, sectors and checksum are right."""

    place: int  # bytes, in the log
    length: int
    tail: int  # where the oldest entry of its sequence is
    sequence: int
    descriptors: int
    flushed: int  # the least size of the file in bytes when this was written
    last: int  # the size in bytes that the file needs


def replay(read: Read, file_size: int, guid: bytes, place: int, length: int) -> Replay:
    """Return the changes in the log.

    Args:
        read: reads the image file.
        file_size: the image file's size in bytes.
        guid: the log's identity in the header.
        place: where the log is in the file, in bytes.
        length: the log's size in bytes.

    Raises: DriverError if it is damaged, or larger than the limits above.
    """
    if place < _MIB or place % _MIB or length % _MIB or place + length > file_size:
        raise damaged(f"its log of {length} bytes at byte {place} is not inside the file of {file_size}")
    if length > MAX_LOG:
        raise DriverError(f"its log has {format_size(length)}, more than the {format_size(MAX_LOG)} that are supported")
    ring = _Ring(read(place, length), guid)
    entries = _newest(ring)
    if not entries:
        raise damaged("its log is not empty, but has no complete entry")
    head = entries[-1]
    if file_size < head.flushed:
        raise DriverError(
            f"it was truncated: it had {head.flushed} bytes when it was last written to, and now has {file_size}; "
            "copy it again from its source"
        )
    if head.last > _MAX_END:
        raise damaged(f"its log says that the file needs {head.last} bytes")
    if sum(entry.descriptors for entry in entries) > _MAX_DESCRIPTORS:
        raise DriverError(f"its log has more than the {_MAX_DESCRIPTORS} changes that are supported")
    found = [change for entry in entries for change in ring.changes(entry) if change[1]]
    for start, size, _ in found:
        if start < _HEADERS_END or start + size > _MAX_END or (start < place + length and place < start + size):
            raise damaged(f"its log changes {size} bytes at byte {start}, where nothing may be changed")
    changes = Changes(reversed(found))
    return Replay(changes, max(file_size, changes.end, head.last), len(entries))


def _newest(ring: _Ring) -> list[_Entry]:
    """Return the newest complete sequence, the oldest entry first; empty if there is none."""
    best: list[_Entry] = []
    hopeless: set[int] = set()  # places of entries in sequences whose oldest entry is gone
    place = 0
    while place < ring.size:
        found = [] if place in hopeless else ring.sequence(place)
        places = [entry.place for entry in found]
        if found and found[-1].tail in places:
            if not best or found[-1].sequence > best[-1].sequence:
                best = found[places.index(found[-1].tail) :]  # the entries before were applied
            place += sum(entry.length for entry in found)
        else:
            hopeless.update(places)
            place += _SECTOR
    return best


class _Ring:
    """The log's bytes, and its complete entries."""

    def __init__(self, data: bytes, guid: bytes) -> None:
        self.size = len(data)
        self._data = data
        self._guid = guid
        self._known: dict[int, _Entry | None] = {}
        self._left = _MAX_LOOKS * self.size  # bytes that may still be checked

    def sequence(self, place: int) -> list[_Entry]:
        """Return consecutive entries from a place on."""
        found: list[_Entry] = []
        while (entry := self._entry(place)) and (not found or entry.sequence == found[-1].sequence + 1):
            found.append(entry)
            place = (place + entry.length) % self.size
        return found

    def changes(self, entry: _Entry) -> Iterator[Change]:
        """Yield the changes in an entry, in order."""
        body = self._body(entry.place, entry.length)
        place = _first_sector(entry.descriptors)
        for signature, trailing, leading, offset, _ in _descriptors(body, entry.descriptors):
            if signature == b"zero":
                yield offset, int.from_bytes(leading, "little"), None
            else:
                yield offset, _SECTOR, leading + body[place + 8 : place + _SECTOR - 4] + trailing
                place += _SECTOR

    def _entry(self, place: int) -> _Entry | None:
        if place not in self._known:
            self._known[place] = self._look(place)
        return self._known[place]

    def _look(self, place: int) -> _Entry | None:
        """Check what is cheap first. File sizes need not be whole MiB as the format demands: QEMU writes others."""
        signature, checksum, length, tail, sequence, count, _, guid, flushed, last = _ENTRY.unpack_from(
            self._data, place
        )
        entry = _Entry(place, length, tail, sequence, count, flushed, last)
        if signature != b"loge" or guid != self._guid or not sequence:
            return None
        if not _SECTOR <= length <= self.size or (length | tail) % _SECTOR or _first_sector(count) > length:
            return None
        self._pay(_first_sector(count))
        body = self._body(place, length)
        if not _is_right(body, entry):
            return None
        self._pay(length)
        return entry if crc32c(body[:4] + bytes(4) + body[8:]) == checksum else None

    def _body(self, place: int, length: int) -> bytes:
        body = self._data[place : place + length]
        return body + self._data[: length - len(body)]

    def _pay(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise damaged("the entries of its log overlap")


def _is_right(body: bytes, entry: _Entry) -> bool:
    """Return whether all parts of an entry have its number, and are valid."""
    place, number = _first_sector(entry.descriptors), entry.sequence.to_bytes(8, "little")
    for signature, _, leading, offset, sequence in _descriptors(body, entry.descriptors):
        if sequence != entry.sequence or offset % _SECTOR:
            return False
        if signature == b"zero":
            if int.from_bytes(leading, "little") % _SECTOR:
                return False
        elif signature == b"desc":
            sector = body[place : place + _SECTOR]
            if sector[:8] != b"data" + number[4:] or sector[-4:] != number[:4]:
                return False
            place += _SECTOR
        else:
            return False
    return True


def _descriptors(body: bytes, count: int) -> Iterator[tuple[bytes, bytes, bytes, int, int]]:
    return _DESCRIPTOR.iter_unpack(body[_ENTRY.size : _ENTRY.size + count * _DESCRIPTOR.size])


def _first_sector(descriptors: int) -> int:
    """Return where the data sectors begin in an entry with so many descriptors, in bytes."""
    return -(-(_ENTRY.size + descriptors * _DESCRIPTOR.size) // _SECTOR) * _SECTOR
