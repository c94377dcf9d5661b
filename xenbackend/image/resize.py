"""Making the disk of an image larger; what is new reads as zeros, whatever the image had behind its disk's end.

Must not make one smaller, nor write where data are. Each step leaves an image that is whole: what is new becomes part
of it by the write of one sector, and whoever is killed before has lost room in the file at most. A file becomes longer
where it has to; on a block device everything goes behind what the image uses there.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import replace

from xenbackend.block.driver import File
from xenbackend.block.drivers.vhd import is_device
from xenbackend.block.formats import qcow, qcow2, qcow2_check, vhd, vhd_tables
from xenbackend.block.formats.qcow2_repair import Write, plan_repair
from xenbackend.block.formats.vhd import SECTOR
from xenbackend.block.formats.vhd_places import places_of, ranges_of
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image import behind, qcow_check
from xenbackend.image.check import ERRORS, STEP, check, refuse_unchosen_data, write_plan
from xenbackend.image.names import Image
from xenbackend.image.session import Session
from xenbackend.units import PAGE, format_size, round_up

_QCOW2_SIZE_AT, _QCOW2_SIZE_TO_L1 = 24, struct.Struct(">QIIQ")  # size, encryption, L1 entries, L1 offset
_QCOW_SIZE_AT, _QCOW_L1_AT = 24, 40


def resize(image: Image, size: int) -> int:
    """Make a disk `size` bytes large, and return how large it was.

    Raises: ConfigError, where it would become smaller, or where the parent would show in what is new; DriverError,
        where it is in use, damaged, of a kind that cannot grow, or has its data in a file that only it names; OSError.
    """
    if size % SECTOR:
        raise ConfigError(f"a disk of {size} bytes cannot be; its size is a multiple of 512")
    before = _check_growth(image, size)
    if size == before:
        return before
    if image.format != "raw" and check(image).status == ERRORS:
        raise DriverError("it is damaged; look at it with image check first", layer=image.text)
    with Session() as session:
        file = session.open_file(image.path, read_only=False, step=STEP[image.format])
        try:
            if _SIZE[image.format](file) != before:  # nobody else writes to it from here on
                raise DriverError("somebody else has changed its size meanwhile; look at it, and do it again")
            if image.data_file:
                data = session.open_file(image.data_file, read_only=False, step=SECTOR)
                _grow_data(data, file, image.data_file, size)
            _GROW[image.format](file, size, on_device=is_device(image.path))
            file.sync()
        except DriverError as error:
            error.layer = error.layer or image.text
            raise
    return before


def _check_growth(image: Image, size: int) -> int:
    """Return how large a disk is. Raises: as `resize`."""
    with Session() as session:
        layers = session.open(image.chain, read_only=True).chain.layers
        before = layers[0].geometry.size
        if size < before:
            problem = f"it has {format_size(before)} and cannot become smaller; what is behind {format_size(size)}"
            raise ConfigError(f"{problem} would be lost")
        if size > before and len(layers) > 1 and layers[1].geometry.size > before:
            raise ConfigError("its parent is larger than it is, and would show in what is new; convert it instead")
        if size > before:
            file = session.open_file(image.path, read_only=True, step=SECTOR)
            refuse_unchosen_data(image, file)
            if image.format == "qcow2" and qcow2.parse_header(file.read_at, file.size).has_subclusters:
                problem = "it has subclusters (extended L2 entries), and it can only be read; convert it instead"
                raise DriverError(problem, layer=image.text)
        return before


def _grow_raw(file: File, size: int, *, on_device: bool) -> None:
    if on_device:
        raise _no_room(size, file.size)
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
    for place, cleared in behind.zeros(data.read_at, header.size, end):
        data.write_at(place, cleared)
    data.sync()


def _grow_qcow2(file: File, size: int, *, on_device: bool) -> None:
    header = qcow2.parse_header(file.read_at, file.size)
    if header.snapshot_count and header.version == 2:
        raise DriverError("an image of version 2 with snapshots cannot grow; convert it instead")
    entries = max(1, -(-size >> header.cluster_bits + header.l2_bits))
    if entries * 8 > qcow2.MAX_L1_BYTES:
        raise ConfigError(f"{format_size(size)} are too many for its clusters; convert it to larger ones")
    if header.autoclear != header.kept_autoclear:
        write_plan(file, [[qcow2.autoclear_bytes(header.kept_autoclear)]])  # bitmaps know nothing of what is new
    hidden = behind.behind_qcow2(file, header, size, on_device=on_device)
    _write(file, hidden, on_device=on_device)
    if entries * 8 <= header.l1.length:
        write_plan(file, [[(_QCOW2_SIZE_AT, struct.pack(">Q", size))]])
    else:
        found = qcow2_check.Check(file.read_at, file.size)
        found.run()
        place = behind.room_in_qcow2(found, on_device=on_device)
        table = file.read_at(header.l1.offset, header.l1.length).ljust(entries * 8, b"\0")
        moved = _QCOW2_SIZE_TO_L1.pack(size, 0, entries, place)
        _write(file, [*behind.take_room(found, place, table), [(_QCOW2_SIZE_AT, moved)]], on_device=on_device)
    if any(hidden) or entries * 8 > header.l1.length:
        after = qcow2_check.Check(file.read_at, file.size)
        after.run()
        write_plan(file, plan_repair(after))  # the room of what was hidden, and of the table that was


def _grow_qcow(file: File, size: int, *, on_device: bool) -> None:
    header = qcow.parse_header(file.read_at, file.size)
    length = -(-size >> header.cluster_bits + header.l2_bits) * 8
    if length > qcow2.MAX_L1_BYTES:
        raise ConfigError(f"{format_size(size)} are too many for its clusters; convert it to qcow2")
    step = max(header.cluster_size, PAGE)
    end = qcow_check.used_end(file.read_at, file.size) if on_device else file.size
    hidden = behind.behind_qcow(file, header, size, room := round_up(end, step))
    _write(file, hidden, on_device=on_device)
    if any(offset == room for writes in hidden for offset, _ in writes):
        room += step
    start = bytearray(file.read_at(0, SECTOR).ljust(SECTOR, b"\0"))
    struct.pack_into(">Q", start, _QCOW_SIZE_AT, size)
    plan: list[list[Write]] = []
    if length > header.l1.length:
        plan.append([(room, file.read_at(header.l1.offset, header.l1.length).ljust(length, b"\0"))])
        struct.pack_into(">Q", start, _QCOW_L1_AT, room)
    _write(file, [*plan, [(0, bytes(start))]], on_device=on_device)


def _grow_vhd(file: File, size: int, *, on_device: bool) -> None:
    vhd.check_new_size(size)
    footer, _ = vhd.read_footer(file.read_at, file.size)
    if footer.size != footer.current_size:
        raise DriverError("its size is that of its geometry, and cannot grow; convert it instead")
    grown = replace(footer, current_size=size, geometry=vhd.geometry_of(size))
    packed = vhd.pack_footer(grown)
    if footer.type == vhd.FIXED:
        _grow_fixed_vhd(file, footer, grown, on_device=on_device)
        return
    header = vhd.read_header(file.read_at, footer, file.size)
    end = _end_of_vhd(file, footer, header)
    if on_device and end > file.size - SECTOR:
        raise _no_room(end + SECTOR, file.size)  # a block is where the footer has to be
    if size > header.entries * header.block_size:
        _check_table_moves(file, footer, header, size)
    write_plan(file, behind.behind_vhd(file, footer, header, size))
    if size > header.entries * header.block_size:
        _move_table(file, footer, header, -(-size // header.block_size), end if on_device else 0)
    write_plan(file, [[(file.size - SECTOR, packed)], [(0, packed)]])


def _grow_fixed_vhd(file: File, footer: vhd.Footer, grown: vhd.Footer, *, on_device: bool) -> None:
    """Let the file end where it has to with the footer that it has, clear what is in between, then write the new one.

    What is in between is the former footer, and whatever a file has that is longer than its disk.
    """
    if on_device and grown.size > file.size - SECTOR:
        raise _no_room(grown.size + SECTOR, file.size)
    file.grow(grown.size + SECTOR, vhd.pack_footer(footer))
    file.sync()
    for place, data in behind.zeros(file.read_at, footer.size, grown.size):
        file.write_at(place, data)
    file.sync()
    write_plan(file, [[(file.size - SECTOR, vhd.pack_footer(grown))]])


def _end_of_vhd(file: File, footer: vhd.Footer, header: vhd.Header) -> int:
    """Return where everything ends that the image has, but for its footer. Raises: DriverError."""
    table = vhd_tables.read_table(file.read_at, footer, header)
    places = ranges_of(places_of(footer, header, None))
    end = vhd_tables.check_table(table, header, places, file.size)
    taken = [*places, *vhd_tables.batmap_ranges(file.read_at, footer, header)]
    return max(end, *(stop for _, stop in taken if stop <= file.size))


def _check_table_moves(file: File, footer: vhd.Footer, header: vhd.Header, size: int) -> None:
    """Refuse what needs a longer table and cannot have it. Raises: ConfigError, DriverError."""
    table = vhd_tables.read_table(file.read_at, footer, header)
    if vhd_tables.read_batmap(file.read_at, footer, header, table) is not None:
        raise DriverError("it has a map of full blocks, which cannot grow here; convert it instead")
    if size > vhd.MAX_ENTRIES * header.block_size:
        raise ConfigError(f"its blocks of {format_size(header.block_size)} are too small for that; convert it instead")


def _move_table(file: File, footer: vhd.Footer, header: vhd.Header, entries: int, device_end: int) -> None:
    """Put a longer table behind everything else, then let the header point there: its first sector says all of it.

    On a block device that is behind what the image has, else at the file's end, which becomes longer by that.
    """
    table = vhd_tables.read_table(file.read_at, footer, header)
    place = round_up(device_end or file.size, PAGE)
    data = vhd_tables.pack_entries(table).ljust(round_up(4 * entries, SECTOR), b"\xff")
    end = place + len(data) + SECTOR
    if device_end and end > file.size:
        raise _no_room(end, file.size)
    if not device_end:
        file.grow(round_up(end, PAGE), vhd.pack_footer(footer))
    moved = vhd.pack_header(replace(header, table_offset=place, entries=entries))
    write_plan(file, [[(place, data)], [(footer.data_offset, moved)]])


def _write(file: File, plan: list[list[Write]], *, on_device: bool) -> None:
    """Do what a plan says, all of which has to fit onto a block device. Raises: DriverError, OSError."""
    end = max((offset + len(data) for writes in plan for offset, data in writes), default=0)
    if on_device and end > file.size:
        raise _no_room(end, file.size)
    write_plan(file, plan)


def _no_room(needed: int, size: int) -> DriverError:
    problem = f"the device has {format_size(size)}, and {format_size(needed)} are needed for that"
    return DriverError(f"{problem}; make the device larger first", errno=errno.ENOSPC)


_SIZE: dict[str, Callable[[File], int]] = {  # bytes of the disk
    "raw": lambda file: file.size,
    "qcow2": lambda file: qcow2.parse_header(file.read_at, file.size).size,
    "qcow": lambda file: qcow.parse_header(file.read_at, file.size).size,
    "vhd": lambda file: vhd.read_footer(file.read_at, file.size)[0].size,
}
_GROW = {"raw": _grow_raw, "qcow2": _grow_qcow2, "qcow": _grow_qcow, "vhd": _grow_vhd}
