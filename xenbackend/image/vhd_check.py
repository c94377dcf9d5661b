"""Checks whether a VHD image is sound: its footers, header, table, and parent names; and plans its repair.

Source: "Virtual Hard Disk Image Format Specification", version 1.0; blktap's ``vhd-util check`` for what other programs
require of a parent's names. Must not write, read a block, or open the parent.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from xenbackend.block.driver import File
from xenbackend.block.formats import vhd, vhd_tables
from xenbackend.block.formats.common import Read, Write
from xenbackend.block.formats.vhd import Footer, Header
from xenbackend.block.formats.vhd_names import NAME_CODES, OTHER_CODES, names_in, space_of
from xenbackend.block.formats.vhd_places import Place, overlaps, places_of, ranges_of
from xenbackend.block.formats.vhd_tables import UNUSED
from xenbackend.errors import DriverError, printable
from xenbackend.image.faults import Faults
from xenbackend.units import PAGE, SECTOR, round_up

_RENAME = "record its parent's name again with image rebase --unsafe"


def check(read: Read, file_size: int, *, on_device: bool = False) -> Faults:
    """Return what is wrong with an image. On a block device, which may be larger than the image, room is not lost.

    Raises: DriverError if it is not an image, or is too damaged to be examined; OSError.
    """
    faults = Faults()
    footer, is_at_end = vhd.read_footer(read, file_size)
    if not (is_at_end or on_device):
        faults.add_error(
            "it does not end with a footer: a program that wrote to it was killed, or the file was cut short"
        )
    if footer.type == vhd.FIXED:
        if footer.size > file_size - SECTOR:
            faults.add_error(f"the file has {file_size} bytes, too few for its disk of {footer.size}")
        return faults
    if is_at_end and read(0, SECTOR) != vhd.pack_footer(footer):
        faults.add_error("the copy of the footer at its beginning differs")
    header = vhd.read_header(read, footer, file_size)
    _check_parent(read, file_size, footer, header, faults)
    table = vhd_tables.read_table(read, footer, header)
    room = file_size - SECTOR if is_at_end else file_size
    places = places_of(footer, header, vhd_tables.read_batmap(read, footer, header, table))
    _check_places(places, room, faults)
    try:
        end = vhd_tables.check_table(table, header, ranges_of(places), room)
    except DriverError as error:
        faults.add_error(error.problem)
        return faults
    if end > room:
        faults.add_error(f"its last block ends at {end}, beyond the end of the file")
    stride = header.bitmap_size + header.block_size
    used = sorted(sector * SECTOR for sector in table if sector != UNUSED)
    taken = sorted([*ranges_of(places), *((place, place + stride) for place in used)])
    lost = 0 if on_device else _lost(taken, room, stride)
    if lost:
        faults.add_leaks(
            lost, f"there is room for {lost} blocks that nothing uses; image convert makes an image without them"
        )
    return faults


def plan_repair(file: File, *, on_device: bool = False) -> list[list[Write]]:
    """Return a plan that restores both footers of an image, and removes parent names that lie outside of it.

    Returns: lists of writes. A header with fewer names is written to a new place, since it is larger than a sector; the
        footers point there once it is durable.

    Raises: DriverError, OSError.
    """
    footer, is_at_end = vhd.read_footer(file.read_at, file.size)
    if footer.type == vhd.FIXED:
        raise DriverError("a fixed image that is too short cannot be repaired; restore it")
    header = vhd.read_header(file.read_at, footer, file.size)
    table = vhd_tables.read_table(file.read_at, footer, header)
    room = file.size - SECTOR if is_at_end else file.size
    places = ranges_of(places_of(footer, header, vhd_tables.read_batmap(file.read_at, footer, header, table)))
    end = vhd_tables.check_table(table, header, places, room)
    kept = tuple(each for each in header.locators if each.offset + space_of(each) <= room)
    plan: list[list[Write]] = []
    if kept != header.locators and any(names_in(file.read_at, each, file.size) for each in kept):
        used = max(end, *(stop for _, stop in places if stop <= room))
        place = round_up(used if on_device else max(end, file.size), PAGE)
        plan.append([(place, vhd.pack_header(replace(header, locators=kept)))])
        footer, is_at_end, end = replace(footer, data_offset=place), False, place + vhd.HEADER_SIZE
    packed = vhd.pack_footer(footer)
    if on_device and end > file.size - SECTOR:
        raise DriverError("the device has no room for the repair; copy the image to a larger one")
    if end > room or not is_at_end:
        place = file.size if on_device else round_up(max(end, file.size) + SECTOR, PAGE)
        plan.append([(place - SECTOR, packed)])
    return plan if file.read_at(0, SECTOR) == packed else [*plan, [(0, packed)]]


def _check_parent(read: Read, file_size: int, footer: Footer, header: Header, faults: Faults) -> None:
    """Check what the image itself says about its parent. Where the names lead is found by opening it."""
    if footer.type != vhd.DIFFERENCING:
        if any(header.parent_uuid) or header.parent_name or header.locators:
            faults.add_error(
                "it is marked as having no parent, but names one; image convert makes an image of its data"
            )
        return
    if not header.locators:
        faults.add_error(f"it is marked as having a parent, but no locator names it; {_RENAME}")
    for code, count in Counter(each.code for each in header.locators).items():
        name = printable(code.decode("latin-1"))
        if code not in NAME_CODES + OTHER_CODES:
            faults.add_error(f"a locator has the code {name}, which the format does not know; {_RENAME}")
        elif count > 1:
            faults.add_error(f"{count} locators have the code {name}, and may name different parents; {_RENAME}")
    for each in header.locators:
        if each.code in NAME_CODES and not names_in(read, each, file_size):
            name = printable(each.code.decode("latin-1"))
            faults.add_error(f"its parent's name ({name}) at {each.offset} cannot be read; {_RENAME}")


def _check_places(places: list[Place], room: int, faults: Faults) -> None:
    for place in places:
        if place.end > room:
            faults.add_error(f"{place.what} at {place.offset} is not inside the file, which has room up to {room}")
    for one, other in overlaps(places):
        faults.add_error(f"{one.what} at {one.offset} and {other.what} at {other.offset} overlap")


def _lost(taken: list[tuple[int, int]], end: int, stride: int) -> int:
    """Return how many blocks would fit between the used ranges, which are sorted, up to `end`."""
    lost = place = 0
    for start, stop in [*taken, (end, end)]:
        lost += max(0, min(start, end) - place) // stride
        place = max(place, stop)
    return lost
