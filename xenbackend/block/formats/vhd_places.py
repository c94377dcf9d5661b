"""The places of everything in a VHD image but its blocks: footers, header, table, map of full blocks, parent's names.

Sources: "Virtual Hard Disk Image Format Specification", version 1.0; for the batmap blktap's ``include/vhd.h``.

Must not open a file, nor decide what happens to an image whose places are impossible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xenbackend.block.formats.vhd import HEADER_SIZE, Footer, Header
from xenbackend.block.formats.vhd_names import space_of
from xenbackend.block.formats.vhd_tables import Batmap
from xenbackend.errors import printable
from xenbackend.units import SECTOR, round_up


@dataclass(frozen=True, slots=True)
class Place:
    """A range of the file in bytes, and what is there. `changes`: it is written to while the disk is in service."""

    what: str
    offset: int
    end: int
    changes: bool = False


def places_of(footer: Footer, header: Header, batmap: Batmap | None) -> list[Place]:
    """Return all places but that of the footer at the end. They may be anywhere, also beyond the file's end."""
    table_end = header.table_offset + round_up(4 * header.entries, SECTOR)  # it is written by whole sectors
    places = [
        Place("the footer's copy", 0, SECTOR),
        Place("the header", footer.data_offset, footer.data_offset + HEADER_SIZE),
        Place("the table", header.table_offset, table_end, changes=True),
    ]
    for each in header.locators:
        name = f"the parent's name ({printable(each.code.decode('latin-1'))})"
        places.append(Place(name, each.offset, each.offset + space_of(each)))
    if batmap is not None:
        start, map_start = batmap.header_offset, batmap.offset
        places.append(Place("the header of the map of full blocks", start, start + SECTOR, changes=True))
        places.append(Place("the map of full blocks", map_start, map_start + batmap.size, changes=True))
    return places


def ranges_of(places: Iterable[Place]) -> list[tuple[int, int]]:
    """Return the offset and end of each place."""
    return [(each.offset, each.end) for each in places]


def overlaps(places: Iterable[Place]) -> Iterator[tuple[Place, Place]]:
    """Yield each pair of places that overlap, in the order of their offsets."""
    before: list[Place] = []
    for place in sorted(places, key=lambda each: each.offset):
        yield from ((each, place) for each in before if place.offset < each.end and place.offset < place.end)
        before.append(place)
