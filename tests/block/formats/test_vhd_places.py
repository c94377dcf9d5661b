"""Tests of `xenbackend.block.formats.vhd_places`."""

from __future__ import annotations

from tests import vhd_images
from tests.block.formats.test_vhd import reader
from xenbackend.block.formats import vhd, vhd_tables
from xenbackend.block.formats.vhd_places import Place, overlaps, places_of, ranges_of


def test_all_that_is_no_block_has_a_place() -> None:
    """Footer, header, table, map and names are where blktap puts them, side by side. The table ends with its sector."""
    names = [(b"W2ru", b"a\0"), (b"MacX", b"x")]
    data = vhd_images.image(8 << 20, {0: {}}, parent_uuid=b"p" * 16, names=names, full=[0])
    footer, _ = vhd.read_footer(reader(data), len(data))
    header = vhd.read_header(reader(data), footer, len(data))
    table = vhd_tables.read_table(reader(data), footer, header)
    places = places_of(footer, header, vhd_tables.read_batmap(reader(data), footer, header, table))

    expected = [(0, 512), (512, 1536), (1536, 2048), (3072, 3584), (3584, 4096), (2048, 2560), (2560, 3072)]
    assert expected == ranges_of(places)
    changing = ["the table", "the header of the map of full blocks", "the map of full blocks"]
    assert changing == [each.what for each in places if each.changes]
    assert "the parent's name (W2ru)" == places[3].what
    assert [] == list(overlaps(places))


def test_what_overlaps_is_found() -> None:
    """Two places that share a byte are reported in the file's order. Places that only touch, or are empty, are not."""
    one, two, three = Place("1", 0, 512), Place("2", 511, 1024), Place("3", 100, 101)

    assert [(one, three), (one, two)] == list(overlaps([two, three, one]))
    assert [] == list(overlaps([one, Place("4", 512, 600), Place("5", 7, 7)]))
