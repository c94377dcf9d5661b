"""Clears what an image has behind the end of its disk, so that a disk that becomes larger reads as zeros there.

There may be data because the disk was larger before, another program has shrunk it, or the image was made with bad
intent. Each function returns a plan, to be carried out while the disk still has its old end: lists of writes, each of
which is durable before the next one begins. Nobody can see their changes before the disk becomes larger.

Must not write, nor change the content of the disk or of a snapshot.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from xenbackend.block.driver import File
from xenbackend.block.formats import qcow, qcow2, qcow2_check, vhd, vhd_tables
from xenbackend.block.formats.common import Plan, Read, Write
from xenbackend.block.formats.qcow2_repair import plan_repair
from xenbackend.block.formats.qcow2_tables import (
    COMPRESSED,
    COPIED,
    OFFSET,
    ZERO,
    compressed_place,
    inflate,
    pack_table,
    unpack_table,
)
from xenbackend.block.formats.vhd_tables import UNUSED
from xenbackend.block.formats.zstd import find_unzstd
from xenbackend.units import SECTOR, round_up

_CHUNK = 1 << 20  # bytes that are read, and written, at a time


def zeros(read: Read, start: int, end: int) -> Iterator[Write]:
    """Yield the writes that make a range of a file read as zeros; chunks that do so already are skipped."""
    for place in range(start, end, _CHUNK):
        data = read(place, min(_CHUNK, end - place))
        if data.strip(b"\0"):
            yield place, bytes(len(data))


def behind_vhd(file: File, footer: vhd.Footer, header: vhd.Header, size: int) -> Plan:
    """Return a plan that marks the additional entries of a disk of `size` bytes unused, and clears the last block.

    Of the last block, only the part behind the disk's end is cleared. `footer` and `header` are the present ones. The
    map of full blocks, if any, forgets these blocks as well. Raises: DriverError.
    """
    table = vhd_tables.read_table(file.read_at, footer, header)
    block, inside = divmod(footer.size, header.block_size)
    plan: Plan = []
    if inside and table[block] != UNUSED:
        place = table[block] * SECTOR + header.bitmap_size
        end = place + min(header.block_size, inside + size - footer.size)
        plan.append(list(zeros(file.read_at, place + inside, end)))
    count = min(header.entries, -(-size // header.block_size))
    data = file.read_at(header.table_offset, 4 * count)
    kept = data[: 4 * len(table)].ljust(len(data), b"\xff")
    plan.append(list(_sectors(header.table_offset, data, kept)))
    batmap = vhd_tables.read_batmap(file.read_at, footer, header, table)
    if batmap is not None:
        packed, bits = vhd_tables.pack_batmap(batmap, batmap.blocks)
        if bits != file.read_at(batmap.offset, batmap.size):
            plan += [[(batmap.offset, bits)], [(batmap.header_offset, packed)]]
    return plan


def behind_qcow(file: File, header: qcow.Header, size: int, room: int) -> Plan:
    """Return a plan that empties the additional entries of a disk of `size` bytes, and clears the last cluster.

    Of the last cluster, only the part behind the disk's end is cleared. If it is compressed, and has data there, it is
    written uncompressed at `room`, an unused place of the file.

    Raises: DriverError.
    """
    bits, l2_bits = header.cluster_bits, header.l2_bits
    number, used, inside = _end_of(header.size, bits, l2_bits)
    place = unpack_table(file.read_at(header.l1.offset, header.l1.length))[number]
    if not place:
        return []
    data = file.read_at(place, 8 << l2_bits)
    words = unpack_table(data)
    plan: Plan = []
    last = words[used - 1]
    if inside and last & qcow.COMPRESSED:
        region = qcow.compressed_place(last, bits)
        content = inflate(file.read_at(region.offset, region.length), header.cluster_size)
        if content[inside:].strip(b"\0"):
            plan.append([(room, content[:inside].ljust(header.cluster_size, b"\0"))])
            words[used - 1] = room
    elif inside and last:
        plan.append(list(zeros(file.read_at, last + inside, last + header.cluster_size)))
    _empty(words, used, number, size, bits)
    return [*plan, list(_sectors(place, data, pack_table(words)))]


def behind_qcow2(file: File, header: qcow2.Header, size: int, *, on_device: bool) -> Plan:
    """Return a plan that empties the additional entries of a disk of `size` bytes, and clears the last cluster.

    Of the last cluster, only the part behind the disk's end is cleared. A table or cluster that a snapshot shares, or a
    cluster that is compressed, is copied first. The former clusters are leaks, which a repair finds. An external data
    file is not cleared here.

    Raises: DriverError if the image is damaged; OSError.
    """
    bits = header.cluster_bits
    number, used, inside = _end_of(header.size, bits, header.l2_bits)
    l1_data = file.read_at(header.l1.offset, header.l1.length)
    l1 = unpack_table(l1_data)
    end = max(1, -(-size >> bits + header.l2_bits))
    l1[number + 1 : end] = array("Q", bytes(8 * len(l1[number + 1 : end])))
    l2_place, is_own = l1[number] & OFFSET, bool(l1[number] & COPIED)
    if not l2_place:
        return [list(_sectors(header.l1.offset, l1_data, pack_table(l1)))]
    l2_data = file.read_at(l2_place, header.cluster_size).ljust(header.cluster_size, b"\0")
    words = unpack_table(l2_data)
    copies: list[bytes] = []
    cleared: list[Write] = []
    if inside and not header.has_data_file:
        content, cleared = _last_cluster(file.read_at, header, words[used - 1], inside, is_own=is_own)
        copies += [content] if content else []
    _empty(words, used, number, size, bits)
    is_changed = bool(copies) or pack_table(words) != l2_data
    found = qcow2_check.Check(file.read_at, file.size)
    raised: Plan = []
    if copies or (is_changed and not is_own):
        found.run()
        room = room_in_qcow2(found, on_device=on_device)
        if copies:
            words[used - 1] = room | COPIED
        if not is_own:
            l1[number] = room + len(copies) * header.cluster_size | COPIED
            copies.append(pack_table(words))
        raised = take_room(found, room, b"".join(copies))
    plan = [cleared, *raised]
    if is_own:
        plan.append(list(_sectors(l2_place, l2_data, pack_table(words))))
    return [*plan, list(_sectors(header.l1.offset, l1_data, pack_table(l1)))]


def room_in_qcow2(found: qcow2_check.Check, *, on_device: bool) -> int:
    """Return the offset where a checked image ends: the end of its file, or on a device that of its used clusters."""
    bits = found.header.cluster_bits
    if not on_device:
        return round_up(found.file_size, 1 << bits)
    number = max(number for number, page in found.counts.pages.items() if any(page))
    page = found.counts.pages[number]
    last = max(place for place, uses in enumerate(page) if uses)
    return ((number << found.counts.page_bits) + last + 1) << bits


def take_room(found: qcow2_check.Check, room: int, data: bytes) -> Plan:
    """Return a plan that writes `data` at `room`, an unused place, and counts its clusters. Raises: DriverError."""
    size, bits = found.header.cluster_size, found.header.cluster_bits
    padded = data.ljust(round_up(len(data), size), b"\0")
    for cluster in range(room >> bits, (room + len(padded)) >> bits):
        found.counts.add(cluster, 1)
    found.file_size = room + len(padded)
    return [[(room, padded)], *plan_repair(found)]


def _last_cluster(
    read: Read, header: qcow2.Header, word: int, inside: int, *, is_own: bool
) -> tuple[bytes, list[Write]]:
    """Return the content of a copy of the last cluster with its end cleared, or else writes that clear it in place."""
    size = header.cluster_size
    if word & COMPRESSED:
        region = compressed_place(word, header.cluster_bits)
        unpack = find_unzstd() if header.compression == "zstd" else inflate
        content = unpack(read(region.offset, region.length), size)
    elif word & OFFSET and not word & ZERO:
        place = word & OFFSET
        if word & COPIED and is_own:
            return b"", list(zeros(read, place + inside, place + size))
        content = read(place, size)
    else:
        return b"", []
    return (content[:inside].ljust(size, b"\0"), []) if content[inside:].strip(b"\0") else (b"", [])


def _end_of(size: int, cluster_bits: int, l2_bits: int) -> tuple[int, int, int]:
    """Return the number of a disk's last L2 table, how many of its entries are used, and bytes of the last cluster.

    The latter are 0 if the disk has the whole cluster.
    """
    clusters = -(-size >> cluster_bits)
    number = clusters - 1 >> l2_bits
    return number, clusters - (number << l2_bits), size & ((1 << cluster_bits) - 1)


def _empty(words: array[int], used: int, number: int, size: int, cluster_bits: int) -> None:
    """Empty those entries of a disk's last table that a larger disk uses in addition."""
    end = min(len(words), -(-size >> cluster_bits) - number * len(words))
    words[used:end] = array("Q", bytes(8 * len(words[used:end])))


def _sectors(place: int, before: bytes, after: bytes) -> Iterator[Write]:
    """Yield writes of the sectors of a table that have changed; `place` is the table's offset, a multiple of SECTOR."""
    for start in range(0, len(before), SECTOR):
        if before[start : start + SECTOR] != after[start : start + SECTOR]:
            yield place + start, after[start : start + SECTOR]
