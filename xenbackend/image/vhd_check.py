"""Whether a VHD image is sound: its footers, header, table and bitmaps; and what mends its footers.

Source: "Virtual Hard Disk Image Format Specification", version 1.0. Must not write, nor touch a block.
"""

from __future__ import annotations

from xenbackend.block.driver import File
from xenbackend.block.formats import vhd, vhd_tables
from xenbackend.block.formats.qcow2_repair import Write
from xenbackend.block.formats.vhd import SECTOR, Footer, Header, Read
from xenbackend.block.formats.vhd_names import space_of
from xenbackend.block.formats.vhd_tables import UNUSED
from xenbackend.errors import DriverError
from xenbackend.image.faults import Faults
from xenbackend.units import PAGE, round_up


def check(read: Read, file_size: int, *, on_device: bool = False) -> Faults:
    """Return what is wrong with an image. On a block device, which does not end where the image does, room is no loss.

    Raises: DriverError, where it is no image, or so damaged that nothing of it can be looked at; OSError.
    """
    faults = Faults()
    footer, is_at_end = vhd.read_footer(read, file_size)
    if not (is_at_end or on_device):
        faults.add_error("its end is no footer: whoever wrote it was killed, or the file was cut short")
    if footer.type == vhd.FIXED:
        if footer.size > file_size - SECTOR:
            faults.add_error(f"the file has {file_size} bytes, too few for its disk of {footer.size}")
        return faults
    if is_at_end and read(0, SECTOR) != vhd.pack_footer(footer):
        faults.add_error("the footer's copy at its beginning is another one")
    header = vhd.read_header(read, footer, file_size)
    table = vhd_tables.read_table(read, footer, header)
    room = file_size - SECTOR if is_at_end else file_size
    metadata = _metadata(footer, header)
    try:
        end = vhd_tables.check_table(table, header, metadata, room)
    except DriverError as error:
        faults.add_error(error.problem)
        return faults
    if end > room:
        faults.add_error(f"its last block ends at {end}, behind the end of the file")
    stride = header.bitmap_size + header.block_size
    used = sorted(sector * SECTOR for sector in table if sector != UNUSED)
    taken = sorted([*metadata, *((place, place + stride) for place in used)])
    lost = 0 if on_device else _lost(taken, room, stride)
    if lost:
        faults.add_leaks(
            lost, f"there is room for {lost} blocks that nothing uses; image convert makes an image without"
        )
    return faults


def plan_repair(file: File) -> list[list[Write]]:
    """Return what gives an image both of its footers again: a list of writes. Raises: DriverError, OSError."""
    footer, is_at_end = vhd.read_footer(file.read_at, file.size)
    packed = vhd.pack_footer(footer)
    if footer.type == vhd.FIXED:
        raise DriverError("a fixed image that is too short cannot be repaired; restore it")
    header = vhd.read_header(file.read_at, footer, file.size)
    table = vhd_tables.read_table(file.read_at, footer, header)
    room = file.size - SECTOR if is_at_end else file.size
    end = vhd_tables.check_table(table, header, _metadata(footer, header), room)
    writes = [] if file.read_at(0, SECTOR) == packed else [(0, packed)]
    if end > room or not is_at_end:
        place = round_up(max(end, file.size) + SECTOR, PAGE) - SECTOR
        writes.insert(0, (place, packed))
    return [writes]


def _metadata(footer: Footer, header: Header) -> list[tuple[int, int]]:
    """Return the ranges that hold no blocks, as offset and end."""
    ranges = [(0, SECTOR), (footer.data_offset, footer.data_offset + 1024)]
    ranges.append((header.table_offset, header.table_offset + 4 * header.entries))
    return ranges + [(each.offset, each.offset + space_of(each)) for each in header.locators]


def _lost(taken: list[tuple[int, int]], end: int, stride: int) -> int:
    """Return how many blocks would fit between the ranges that are taken, sorted, up to `end`."""
    lost = place = 0
    for start, stop in [*taken, (end, end)]:
        lost += max(0, start - place) // stride
        place = max(place, stop)
    return lost
