"""The log of a VHDX image: bytes to the changes that its last user had not put in their places yet.

Source: Microsoft, [MS-VHDX] 2.3. The log is a ring of entries, each with a number that is one more than the one before
and with descriptors of what was to be written where. An entry says where the oldest one is that was not in its place
when it was written: from that one to itself is a sequence. Only the newest sequence that is whole counts: an entry
that was torn, or belongs to an earlier use of the log, ends it.

Must not read outside of the log, nor take a length, a place or a count from it without having looked; what it takes to
look is bounded, too, however the entries lie over one another.
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
_MAX_END = 128 << 40  # bytes: where a change, or the file, ends at most; a disk has 64 TiB
_MAX_LOOKS = 4  # times the log: entries that nobody laid over one another are looked at once
_SECTOR = 4096  # bytes of which entries are made, and that a descriptor of data stands for
_HEADERS_END = 192 << 10  # bytes: what stands before is never changed by a log
_ENTRY = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR = struct.Struct("<4s4s8sQQ")


@dataclass(frozen=True, slots=True)
class Replay:
    """What an image is with its log replayed."""

    changes: Changes
    size: int  # bytes of the file then
    entries: int  # of the log that counted


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry that is whole: signature, identity, descriptors, sectors and checksum are right."""

    place: int  # bytes, in the log
    length: int
    tail: int  # where the oldest entry of its sequence is
    sequence: int
    descriptors: int
    flushed: int  # bytes that the file had at least when this was written
    last: int  # bytes that it needs


def replay(read: Read, file_size: int, guid: bytes, place: int, length: int) -> Replay:
    """Return what the log is to change.

    Args:
        read: reads the image file.
        file_size: its bytes.
        guid: the log's identity, as the header has it.
        place: where the log is in the file, in bytes.
        length: bytes of the log.

    Raises: DriverError, where it is damaged, or larger than any that is known.
    """
    if place < _MIB or place % _MIB or length % _MIB or place + length > file_size:
        raise damaged(f"its log of {length} bytes at byte {place} is not inside the file of {file_size}")
    if length > MAX_LOG:
        raise DriverError(f"its log has {format_size(length)}, and more than {format_size(MAX_LOG)} are not read")
    ring = _Ring(read(place, length), guid)
    entries = _newest(ring)
    if not entries:
        raise damaged("its header says that there is something in its log, and no entry there is whole")
    head = entries[-1]
    if file_size < head.flushed:
        raise DriverError(
            f"it was cut off: it had {head.flushed} bytes when it was last written to, and has {file_size}; "
            "copy it again from where it comes from"
        )
    if head.last > _MAX_END:
        raise damaged(f"its log says that the file needs {head.last} bytes")
    if sum(entry.descriptors for entry in entries) > _MAX_DESCRIPTORS:
        raise DriverError(f"its log has more than {_MAX_DESCRIPTORS} changes, and no more are read")
    found = [change for entry in entries for change in ring.changes(entry) if change[1]]
    for start, size, _ in found:
        if start < _HEADERS_END or start + size > _MAX_END or (start < place + length and place < start + size):
            raise damaged(f"its log changes {size} bytes at byte {start}, where nothing may be changed")
    changes = Changes(reversed(found))
    return Replay(changes, max(file_size, changes.end, head.last), len(entries))


def _newest(ring: _Ring) -> list[_Entry]:
    """Return the newest sequence that is whole, the oldest entry first; nothing where there is none."""
    best: list[_Entry] = []
    hopeless: set[int] = set()  # places in sequences whose oldest entry is gone
    place = 0
    while place < ring.size:
        found = [] if place in hopeless else ring.sequence(place)
        places = [entry.place for entry in found]
        if found and found[-1].tail in places:
            if not best or found[-1].sequence > best[-1].sequence:
                best = found[places.index(found[-1].tail) :]  # what came before is in its place
            place += sum(entry.length for entry in found)
        else:
            hopeless.update(places)
            place += _SECTOR
    return best


class _Ring:
    """The log's bytes, and the entries that are whole."""

    def __init__(self, data: bytes, guid: bytes) -> None:
        self.size = len(data)
        self._data = data
        self._guid = guid
        self._known: dict[int, _Entry | None] = {}
        self._left = _MAX_LOOKS * self.size  # bytes that may still be looked at

    def sequence(self, place: int) -> list[_Entry]:
        """Return the entries from a place on that follow one another."""
        found: list[_Entry] = []
        while (entry := self._entry(place)) and (not found or entry.sequence == found[-1].sequence + 1):
            found.append(entry)
            place = (place + entry.length) % self.size
        return found

    def changes(self, entry: _Entry) -> Iterator[Change]:
        """Yield what an entry changes, in its order."""
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
        """Look at what is cheap first. Sizes are not held to be MiB, as the format has it: QEMU writes others."""
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
            raise damaged("the entries of its log lie over one another")


def _is_right(body: bytes, entry: _Entry) -> bool:
    """Return whether all that an entry is made of has its number, and a meaning."""
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
    """Return where the sectors of data begin in an entry with so many descriptors, in bytes."""
    return -(-(_ENTRY.size + descriptors * _DESCRIPTOR.size) // _SECTOR) * _SECTOR
