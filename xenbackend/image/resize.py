"""Making the disk of an image larger; what is new reads as zeros.

Must not make one smaller, nor write where data are. Each step leaves an image that is whole: what is new becomes part
of it by the write of one sector, and whoever is killed before has lost room in the file at most.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import replace

from xenbackend.block.driver import File
from xenbackend.block.formats import qcow, qcow2, qcow2_check, vhd, vhd_tables
from xenbackend.block.formats.qcow2_repair import Write, plan_repair
from xenbackend.block.formats.vhd import SECTOR
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image.check import ERRORS, STEP, check, write_plan
from xenbackend.image.names import Image
from xenbackend.image.session import Session
from xenbackend.units import PAGE, format_size, round_up

_QCOW2_SIZE_AT, _QCOW2_SIZE_TO_L1 = 24, struct.Struct(">QIIQ")  # size, encryption, L1 entries, L1 offset
_STEP = 1 << 20  # bytes that are looked at in one go
_QCOW_SIZE_AT, _QCOW_L1_AT = 24, 40


def resize(image: Image, size: int) -> int:
    """Make a disk `size` bytes large, and return how large it was.

    Raises: ConfigError, where it would become smaller, or where the parent would show in what is new; DriverError,
        where it is in use, damaged, or of a kind that cannot grow; OSError.
    """
    if size % SECTOR:
        raise ConfigError(f"a disk of {size} bytes cannot be; its size is a multiple of 512")
    before, data_file = _check_growth(image, size)
    if size == before:
        return before
    if image.format != "raw" and check(image).status == ERRORS:
        raise DriverError("it is damaged; look at it with image check first", layer=image.text)
    with Session() as session:
        file = session.open_file(image.path, read_only=False, step=STEP[image.format])
        try:
            if data_file:
                _grow_data(session.open_file(data_file, read_only=False, step=SECTOR), file, data_file, size)
            _GROW[image.format](file, size)
            file.sync()
        except DriverError as error:
            error.layer = error.layer or image.text
            raise
    return before


def _check_growth(image: Image, size: int) -> tuple[int, str]:
    """Return how large a disk is, and where its external data file is, if it has one."""
    with Session() as session:
        layers = session.open(image.chain, read_only=True).chain.layers
        before = layers[0].geometry.size
        if size < before:
            problem = f"it has {format_size(before)} and cannot become smaller; what is behind {format_size(size)}"
            raise ConfigError(f"{problem} would be lost")
        if size > before and len(layers) > 1 and layers[1].geometry.size > before:
            raise ConfigError("its parent is larger than it is, and would show in what is new; convert it instead")
        return before, getattr(layers[0].driver.options, "data_file", "")


def _grow_raw(file: File, size: int) -> None:
    file.grow(size)


def _grow_data(data: File, file: File, path: str, size: int) -> None:
    """Make an external data file as long as the disk will be, and zeros of what it has behind the disk's end until now.

    Of a raw one that is all of it; else what is in the disk's last cluster: the others are not named by the image.
    """
    header = qcow2.parse_header(file.read_at, file.size)
    try:
        data.grow(size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        problem = f"its data file {printable(path)} has {format_size(data.size)}, and there is no room for more"
        raise DriverError(f"{problem}; make that larger first", path=path, errno=errno.ENOSPC) from error
    end = size if header.autoclear & qcow2.RAW_DATA else min(size, round_up(header.size, header.cluster_size))
    for place in range(header.size, end, _STEP):
        length = min(_STEP, end - place)
        if any(data.read_at(place, length)):
            data.write_at(place, bytes(length))
    data.sync()


def _grow_qcow2(file: File, size: int) -> None:
    header = qcow2.parse_header(file.read_at, file.size)
    if header.snapshot_count and header.version == 2:
        raise DriverError("an image of version 2 with snapshots cannot grow; convert it instead")
    entries = max(1, -(-size >> header.cluster_bits + header.l2_bits))
    if entries * 8 > qcow2.MAX_L1_BYTES:
        raise ConfigError(f"{format_size(size)} are too many for its clusters; convert it to larger ones")
    if header.autoclear != header.kept_autoclear:
        write_plan(file, [[qcow2.autoclear_bytes(header.kept_autoclear)]])  # bitmaps know nothing of what is new
    if entries * 8 <= header.l1.length:
        write_plan(file, [[(_QCOW2_SIZE_AT, struct.pack(">Q", size))]])
        return
    found = qcow2_check.Check(file.read_at, file.size)
    found.run()
    bits = header.cluster_bits
    place, clusters = round_up(file.size, header.cluster_size), -(-entries * 8 >> bits)
    for cluster in range(place >> bits, (place >> bits) + clusters):
        found.counts.add(cluster, 1)
    found.file_size = place + (clusters << bits)
    table = file.read_at(header.l1.offset, header.l1.length)
    moved = _QCOW2_SIZE_TO_L1.pack(size, 0, entries, place)
    copied: list[Write] = [(place, table.ljust(clusters << bits, b"\0"))]
    write_plan(file, [copied, *plan_repair(found), [(_QCOW2_SIZE_AT, moved)]])
    after = qcow2_check.Check(file.read_at, file.size)
    after.run()
    write_plan(file, plan_repair(after))  # the room of the table that was


def _grow_qcow(file: File, size: int) -> None:
    header = qcow.parse_header(file.read_at, file.size)
    length = -(-size >> header.cluster_bits + header.l2_bits) * 8
    if length > qcow2.MAX_L1_BYTES:
        raise ConfigError(f"{format_size(size)} are too many for its clusters; convert it to qcow2")
    start = bytearray(file.read_at(0, SECTOR).ljust(SECTOR, b"\0"))
    struct.pack_into(">Q", start, _QCOW_SIZE_AT, size)
    plan: list[list[Write]] = []
    if length > header.l1.length:
        place = round_up(file.size, max(header.cluster_size, PAGE))
        plan.append([(place, file.read_at(header.l1.offset, header.l1.length).ljust(length, b"\0"))])
        struct.pack_into(">Q", start, _QCOW_L1_AT, place)
    write_plan(file, [*plan, [(0, bytes(start))]])


def _grow_vhd(file: File, size: int) -> None:
    vhd.check_new_size(size)
    footer, _ = vhd.read_footer(file.read_at, file.size)
    if footer.size != footer.current_size:
        raise DriverError("its size is that of its geometry, and cannot grow; convert it instead")
    grown = replace(footer, current_size=size, geometry=vhd.geometry_of(size))
    packed = vhd.pack_footer(grown)
    if footer.type == vhd.FIXED:
        file.grow(size + SECTOR, packed)
        file.write_at(footer.size, bytes(SECTOR))  # the footer that was
        return
    header = vhd.read_header(file.read_at, footer, file.size)
    if size > header.entries * header.block_size:
        _move_table(file, footer, header, -(-size // header.block_size))
    write_plan(file, [[(file.size - SECTOR, packed)], [(0, packed)]])


def _move_table(file: File, footer: vhd.Footer, header: vhd.Header, entries: int) -> None:
    """Put a longer table behind everything else, then let the header point there: its first sector says all of it."""
    table = vhd_tables.read_table(file.read_at, footer, header)
    if vhd_tables.read_batmap(file.read_at, footer, header, table) is not None:
        raise DriverError("it has a map of full blocks, which cannot grow here; convert it instead")
    if entries > vhd.MAX_ENTRIES:
        raise ConfigError(f"its blocks of {format_size(header.block_size)} are too small for that; convert it instead")
    place = round_up(file.size, PAGE)
    data = vhd_tables.pack_entries(table).ljust(4 * entries, b"\xff")
    file.grow(round_up(place + len(data) + SECTOR, PAGE), vhd.pack_footer(footer))
    moved = vhd.pack_header(replace(header, table_offset=place, entries=entries))
    write_plan(file, [[(place, data)], [(footer.data_offset, moved)]])


_GROW = {"raw": _grow_raw, "qcow2": _grow_qcow2, "qcow": _grow_qcow, "vhd": _grow_vhd}
