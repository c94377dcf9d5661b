"""Partition tables: bytes to places on a disk.

Sources: UEFI specification 2.10, 5.2 (MBR) and 5.3 (GPT); Linux, block/partitions/efi.c and msdos.c, which decide
if the specifications leave something open. Must not open a file, nor take a number from a table without checking it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from uuid import UUID

from xenbackend.errors import DriverError

Read = Callable[[int, int], bytes]  # offset and length in bytes

_GPT = struct.Struct("<8sIIIIQQQQ16sQIII")  # UEFI 2.10, table 5.5
_SIGNATURE = b"EFI PART"
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")  # table 5.6
_MAX_ENTRIES = 1 << 20  # bytes of the array; our choice: 8,192 entries, and the specification asks for 16 KiB
_MBR_ENTRY = struct.Struct("<B3sB3sII")  # table 5.2
_MBR_TABLE, _MBR_SIGNATURE = 446, b"\x55\xaa"
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)  # msdos.c, is_extended_partition
_MAX_EMPTY = 100  # msdos.c: extended records without a partition, one after the other
MAX_LOGICAL = 256  # partition.h of Linux, DISK_MAX_PARTS


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition: `start` and `length` in bytes, `kind` its type in the table, `table` the kind of table.

    `trouble` says what is wrong with a table that can nevertheless be used.
    """

    start: int
    length: int
    kind: str
    table: str
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class _Record:
    kind: int
    start: int  # sectors, relative to a place that depends on the record
    count: int


@dataclass(frozen=True, slots=True)
class _Gpt:
    entries: bytes
    step: int
    first: int  # usable sectors
    last: int
    backup: int


def find(read: Read, size: int, sector: int, number: int) -> Partition:
    """Return the partition with Linux's number `number`.

    Args:
        read: reads the disk.
        size: the disk's size in bytes.
        sector: bytes of a sector, the unit in tables.
        number: from 1 on.

    Raises: DriverError, with a sentence; the exceptions of `read`.
    """
    records = _records(read(0, 512))
    if records is None:
        raise DriverError("there is no partition table: neither an MBR nor a GPT begins in the first sector")
    if any(each.kind == _PROTECTIVE and each.start == 1 for each in records):  # efi.c, pmbr_part_valid
        found = _find_in_gpt(read, size, sector, number)
    else:
        found = _find_in_mbr(read, size, sector, number, records)
    if found.start + found.length > size:
        raise DriverError(f"partition {number} ends at byte {found.start + found.length}, but the disk at {size}")
    return found


def _find_in_gpt(read: Read, size: int, sector: int, number: int) -> Partition:
    last = size // sector - 1
    gpt, problem = _gpt(read, last, sector, 1)
    trouble = ""
    if gpt is None:
        gpt, second = _gpt(read, last, sector, last)
        if gpt is None:
            raise DriverError(f"both headers of the GPT are damaged: the first {problem}, the one at the end {second}")
        trouble = f"the first header {problem}; the one at the end of the disk is used"
    elif gpt.backup != last:
        trouble = "the second header is not at the end of the disk, which has grown or shrunk since it was written"
    else:
        _, second = _gpt(read, last, sector, last)
        trouble = f"the second header {second}" if second else ""
    count = len(gpt.entries) // gpt.step
    if not 1 <= number <= count:
        raise DriverError(f"there is no partition {number}: the GPT has room for {count}")
    kind, _, start, end, _, _ = _GPT_ENTRY.unpack_from(gpt.entries, (number - 1) * gpt.step)
    if not any(kind):
        raise DriverError(f"there is no partition {number}; the GPT has {_list(_used(gpt))}")
    if not gpt.first <= start <= end <= gpt.last:
        raise DriverError(
            f"partition {number} has sectors {start} to {end}, but the GPT allows only {gpt.first} to {gpt.last}"
        )
    return Partition(start * sector, (end - start + 1) * sector, str(UUID(bytes_le=kind)), "GPT", trouble)


def _gpt(read: Read, last: int, sector: int, place: int) -> tuple[_Gpt | None, str]:
    """Return the table whose header is at sector `place`, or None and what is wrong with it."""
    if not 1 <= place <= last:
        return None, "lies outside of the disk"
    block = read(place * sector, sector)
    signature, _, size, crc, _, mine, backup, first, usable, _, array, count, step, array_crc = _GPT.unpack_from(block)
    if signature != _SIGNATURE:
        return None, "is not there"
    if not _GPT.size <= size <= sector or crc != zlib.crc32(block[:16] + bytes(4) + block[20:size]):
        return None, "has a wrong checksum"
    if mine != place:
        return None, f"says that it belongs to sector {mine}"
    if not first <= usable <= last:
        return None, f"allows sectors {first} to {usable}, but the disk ends at {last}"
    length = count * step
    if (
        step < _GPT_ENTRY.size
        or step % 8
        or not 0 < length <= _MAX_ENTRIES
        or array * sector + length > (last + 1) * sector
    ):
        return None, f"has an impossible array: {count} entries of {step} bytes at sector {array}"
    entries = read(array * sector, length)
    if zlib.crc32(entries) != array_crc:
        return None, "has entries with a wrong checksum"
    return _Gpt(entries, step, first, usable, backup), ""


def _used(gpt: _Gpt) -> Iterator[int]:
    for place in range(0, len(gpt.entries), gpt.step):
        if any(gpt.entries[place : place + 16]):
            yield place // gpt.step + 1


def _find_in_mbr(read: Read, size: int, sector: int, number: int, records: list[_Record]) -> Partition:
    used = {place: each for place, each in enumerate(records, 1) if each.count}
    if number <= len(records):
        if number not in used:
            raise DriverError(f"there is no partition {number}; the MBR has {_list(used)}")
        found = used[number]
        if found.kind in _EXTENDED:
            raise DriverError(f"partition {number} is the extended one; name a logical one in it, from 5 on")
        return _partition(found, 0, sector)
    extended = next((each for each in used.values() if each.kind in _EXTENDED), None)
    if extended is None:
        raise DriverError(f"there is no partition {number}: the MBR has no extended one, and {_list(used)}")
    count = 4
    for count, each in enumerate(_logical(read, size, sector, extended), 5):
        if count == number:
            return each
    raise DriverError(
        f"there is no partition {number}; the last logical one is {count}"
        if count > 4
        else f"there is no partition {number}: there are no logical ones"
    )


def _logical(read: Read, size: int, sector: int, extended: _Record) -> Iterator[Partition]:
    """Yield the logical partitions in the order in which Linux counts them. Source: msdos.c, parse_extended."""
    here, here_count, found, empty = extended.start, extended.count, 0, 0
    while empty <= _MAX_EMPTY and found < MAX_LOGICAL and 0 < here * sector <= size - sector:
        empty += 1
        records = _records(read(here * sector, 512), is_extended=True)
        if records is None:
            return
        for place, each in enumerate(records):
            start = here + each.start
            is_odd = each.start + each.count > here_count or not (
                extended.start <= start and start + each.count <= extended.start + extended.count
            )
            if not each.count or each.kind in _EXTENDED or (place >= 2 and is_odd):  # those often contain garbage
                continue
            empty, found = 0, found + 1
            yield _partition(each, here, sector)
        further = next((each for each in records if each.count and each.kind in _EXTENDED), None)
        if further is None:
            return
        here, here_count = extended.start + further.start, further.count


def _records(block: bytes, *, is_extended: bool = False) -> list[_Record] | None:
    """Return the four entries of a boot record, or None if it is not one."""
    if block[510:512] != _MBR_SIGNATURE:
        return None
    entries = [_MBR_ENTRY.unpack_from(block, _MBR_TABLE + place * _MBR_ENTRY.size) for place in range(4)]
    if not is_extended and any(active not in (0, 0x80) for active, *_ in entries):  # a file system's boot code
        return None
    return [_Record(kind, start, count) for _, _, kind, _, start, count in entries]


def _partition(record: _Record, base: int, sector: int) -> Partition:
    return Partition((base + record.start) * sector, record.count * sector, f"{record.kind:02x}", "MBR")


def _list(numbers: Iterable[int]) -> str:
    found = [str(each) for each in numbers]
    return ", ".join(found[:16]) + ("..." if len(found) > 16 else "") or "none"
