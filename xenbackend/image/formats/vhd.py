"""VHD images: fixed, dynamic and differencing.

Must not read the data in blocks, except the last one of a disk that grows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from xenbackend.block.driver import File
from xenbackend.block.formats import vhd, vhd_tables
from xenbackend.block.formats.blank import Blank, Parent, vhd_with_parent
from xenbackend.block.formats.common import Plan
from xenbackend.block.formats.vhd_places import places_of, ranges_of
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image import behind, vhd_check, writing
from xenbackend.image.faults import Faults
from xenbackend.image.tools import Tools
from xenbackend.opener.local import is_device
from xenbackend.units import PAGE, SECTOR, format_size, round_up

if TYPE_CHECKING:
    from xenbackend.image.facts import Facts
    from xenbackend.image.names import Image
    from xenbackend.image.session import Session


class Vhd(Tools):
    """See `Tools`."""

    def size(self, file: File) -> int:
        """See `Tools`."""
        return vhd.read_footer(file.read_at, file.size)[0].size

    def facts(self, driver: Any, base: Facts) -> Facts:
        """See `Tools`."""
        footer = driver.footer
        cluster_size = 0 if footer.type == vhd.FIXED else driver.header.block_size
        more = {"uuid": str(UUID(bytes=footer.uuid)), "creator": footer.creator.rstrip(b"\0").decode("latin-1")}
        return replace(base, format=vhd.title_of(footer), cluster_size=cluster_size, more=more)

    def check(self, session: Session, image: Image, file: File) -> Faults:
        """See `Tools`. If there are no errors, the image is also opened with its parents, as for a disk in service."""
        faults = vhd_check.check(file.read_at, file.size, on_device=is_device(image.path))
        if not faults.errors:
            _open_parents(session, image, faults)
        return faults

    def plan_repair(self, image: Image, file: File) -> Plan:
        """See `Tools`."""
        return vhd_check.plan_repair(file, on_device=is_device(image.path))

    def grow(self, file: File, size: int, *, on_device: bool) -> None:
        """See `Tools`."""
        vhd.check_new_size(size)
        footer, _ = vhd.read_footer(file.read_at, file.size)
        if footer.size != footer.current_size:
            raise DriverError("its size is given by its geometry, and cannot grow; convert it instead")
        grown = replace(footer, current_size=size, geometry=vhd.geometry_of(size))
        packed = vhd.pack_footer(grown)
        if footer.type == vhd.FIXED:
            _grow_fixed_vhd(file, footer, grown, on_device=on_device)
            return
        header = vhd.read_header(file.read_at, footer, file.size)
        end = _end_of_vhd(file, footer, header)
        if on_device and end > file.size - SECTOR:
            raise writing.no_room(end + SECTOR, file.size)  # a block occupies the place of the footer
        if size > header.entries * header.block_size:
            _check_table_moves(file, footer, header, size)
        writing.write_plan(file, behind.behind_vhd(file, footer, header, size))
        if size > header.entries * header.block_size:
            _move_table(file, footer, header, -(-size // header.block_size), end if on_device else 0)
        writing.write_plan(file, [[(file.size - SECTOR, packed)], [(0, packed)]])

    def measure(self, empty: Blank, cluster: int, used: int, most: int) -> tuple[int, int]:
        """See `Tools`."""
        bitmap = round_up(cluster // SECTOR // 8, SECTOR)
        stride = round_up(bitmap, PAGE) + cluster + PAGE  # blocks begin at pages; a former footer may be between two
        return empty.size + used * stride, empty.size + most * stride

    def check_parent(self, image: Image, file: File, parent: Parent | None, *, is_unsafe: bool) -> None:  # noqa: ARG002 - as in the base class
        """See `Tools`."""
        footer, _ = vhd.read_footer(file.read_at, file.size)
        if footer.type == vhd.FIXED:
            raise ConfigError(f"{image.text} is fixed: it holds all of its disk itself, and cannot have a parent")
        if is_device(image.path):
            raise ConfigError(
                f"{image.text} is on a block device, where a VHD cannot be given another parent; convert it"
            )
        vhd_with_parent(vhd.read_header(file.read_at, footer, file.size), 0, parent)

    def name_parent(self, file: File, parent: Parent | None) -> None:
        """See `Tools`.

        A new header is written behind everything else, then the footers point to it: each is one sector, and so valid.
        """
        footer, _ = vhd.read_footer(file.read_at, file.size)
        header = vhd.read_header(file.read_at, footer, file.size)
        place = round_up(file.size, PAGE)
        moved, names = vhd_with_parent(header, place + vhd.HEADER_SIZE, parent)
        kind = vhd.DIFFERENCING if parent else vhd.DYNAMIC
        pointing = vhd.pack_footer(replace(footer, type=kind, data_offset=place))
        data = vhd.pack_header(moved) + names
        file.grow(round_up(place + len(data) + SECTOR, PAGE), vhd.pack_footer(footer))
        writing.write_plan(file, [[(place, data)], [(file.size - SECTOR, pointing)], [(0, pointing)]])


def _open_parents(session: Session, image: Image, faults: Faults) -> None:
    """Open the image with its parents, by the rules for a disk in service; if that fails, add an error to `faults`.

    It is opened without a lock, which would conflict with the caller's lock, and proves nothing about the content.
    """
    try:
        session.close(session.open(image.chain, read_only=True, locked=False))
    except DriverError as error:
        where = "" if error.layer == image.text else f"its parent {printable(error.layer)}: "
        faults.add_error(f"it cannot be opened: {where}{error.problem}")


def _grow_fixed_vhd(file: File, footer: vhd.Footer, grown: vhd.Footer, *, on_device: bool) -> None:
    """Extend the file with a copy of its present footer at the new end, clear what is in between, write the new footer.

    In between are the former footer, and anything that a file has that is longer than its disk.
    """
    if on_device and grown.size > file.size - SECTOR:
        raise writing.no_room(grown.size + SECTOR, file.size)
    file.grow(grown.size + SECTOR, vhd.pack_footer(footer))
    file.sync()
    for place, data in behind.zeros(file.read_at, footer.size, grown.size):
        file.write_at(place, data)
    file.sync()
    writing.write_plan(file, [[(file.size - SECTOR, vhd.pack_footer(grown))]])


def _end_of_vhd(file: File, footer: vhd.Footer, header: vhd.Header) -> int:
    """Return the offset where the image ends, without its footer. Raises: DriverError."""
    table = vhd_tables.read_table(file.read_at, footer, header)
    places = ranges_of(places_of(footer, header, None))
    end = vhd_tables.check_table(table, header, places, file.size)
    taken = [*places, *vhd_tables.batmap_ranges(file.read_at, footer, header)]
    return max(end, *(stop for _, stop in taken if stop <= file.size))


def _check_table_moves(file: File, footer: vhd.Footer, header: vhd.Header, size: int) -> None:
    """Check that the table can be made long enough for `size` bytes. Raises: ConfigError, DriverError."""
    table = vhd_tables.read_table(file.read_at, footer, header)
    if vhd_tables.read_batmap(file.read_at, footer, header, table) is not None:
        raise DriverError("it has a map of full blocks, which cannot grow here; convert it instead")
    if size > vhd.MAX_ENTRIES * header.block_size:
        raise ConfigError(f"its blocks of {format_size(header.block_size)} are too small for that; convert it instead")


def _move_table(file: File, footer: vhd.Footer, header: vhd.Header, entries: int, device_end: int) -> None:
    """Write a longer table behind everything else, then make the header point to it by writing its first sector.

    On a block device the place is behind the used part (`device_end`), else at the end of the file, which is extended.
    """
    table = vhd_tables.read_table(file.read_at, footer, header)
    place = round_up(device_end or file.size, PAGE)
    data = vhd_tables.pack_entries(table).ljust(round_up(4 * entries, SECTOR), b"\xff")
    end = place + len(data) + SECTOR
    if device_end and end > file.size:
        raise writing.no_room(end, file.size)
    if not device_end:
        file.grow(round_up(end, PAGE), vhd.pack_footer(footer))
    moved = vhd.pack_header(replace(header, table_offset=place, entries=entries))
    writing.write_plan(file, [[(place, data)], [(footer.data_offset, moved)]])
