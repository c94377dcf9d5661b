"""How each version encodes its tables: words to entries, entries to words, and invalid words."""

from __future__ import annotations

from array import array

import pytest

from tests.qcow_images import qcow, qcow2
from xenbackend.block.formats import qcow as format1
from xenbackend.block.formats import qcow2 as format2
from xenbackend.block.formats.qcow2_tables import COMPRESSED, COPIED
from xenbackend.block.formats.qcow2_tables import ZERO as WORD_OF_ZEROS
from xenbackend.block.mapped.tables import OWNED, READABLE, SPECIAL, ZERO
from xenbackend.block.qcow.codec import Version1, Version2
from xenbackend.errors import DriverError

PLACE = 5 << 12
DATA1, DATA2 = qcow(1 << 20), qcow2(1 << 20)
ONE = Version1(format1.parse_header(lambda offset, length: DATA1[offset : offset + length], len(DATA1)))
TWO = Version2(format2.parse_header(lambda offset, length: DATA2[offset : offset + length], len(DATA2)))


@pytest.mark.parametrize(
    ("word", "entry"),
    [
        (0, 0),
        (PLACE | COPIED, PLACE | OWNED),
        (PLACE, PLACE | READABLE),
        (WORD_OF_ZEROS, ZERO),
        (PLACE | WORD_OF_ZEROS | COPIED, ZERO),
        (COMPRESSED | 77, SPECIAL),
        (COPIED, 0),
        (2, 0),
        (1 << 60, 0),
        (PLACE | 2 | COPIED, PLACE | OWNED),
        (PLACE | 1 << 56, PLACE | READABLE),
        (WORD_OF_ZEROS | 6, ZERO),
        (COMPRESSED | COPIED | 77, SPECIAL),
    ],
)
def test_entries_of_version_2(word: int, entry: int) -> None:
    """Each kind of word gives its entry, alone and among others. Reserved bits are ignored."""
    others = [0, PLACE | COPIED, PLACE, WORD_OF_ZEROS, COMPRESSED | 1]

    assert [entry] == list(TWO.decode_l2(array("Q", [word])))
    assert entry == TWO.decode_l2(array("Q", [*others, word, *others]))[len(others)]


@pytest.mark.parametrize("word", [PLACE + 512, PLACE + 512 | WORD_OF_ZEROS, COMPRESSED | 1 << 56])
def test_bad_words_of_version_2(word: int) -> None:
    """A table with a word whose offset is impossible is refused."""
    with pytest.raises(DriverError, match="L2 tables"):
        TWO.decode_l2(array("Q", [PLACE | COPIED, word]))


@pytest.mark.parametrize("entry", [0, PLACE | OWNED, PLACE | READABLE, ZERO])
def test_words_of_version_2(entry: int) -> None:
    """An entry that is encoded as a word is decoded to the same entry."""
    assert [entry] == list(TWO.decode_l2(array("Q", [TWO.encode_l2(entry)])))


@pytest.mark.parametrize(
    ("word", "places"),
    [
        (0, []),
        (WORD_OF_ZEROS, []),
        (PLACE | COPIED, [PLACE]),
        (PLACE | WORD_OF_ZEROS, [PLACE]),
        (COMPRESSED | PLACE + 4000, [PLACE]),
        (COMPRESSED | 1 << 58 | PLACE + 3800, [PLACE, PLACE + 4096]),
    ],
)
def test_places_of_version_2(word: int, places: list[int]) -> None:
    """The clusters of a word are its own one, or those that its compressed bytes touch."""
    assert places == list(TWO.places_of(word))


def test_l1_of_version_2() -> None:
    """An L2 table may be overwritten if its flag says so, or if it is new. Reserved bits are ignored."""
    assert (PLACE, True) == TWO.decode_l1(PLACE | COPIED)
    assert (PLACE, False) == TWO.decode_l1(PLACE)
    assert (0, False) == TWO.decode_l1(0)
    assert (0, False) == TWO.decode_l1(COPIED)
    assert (PLACE, False) == TWO.decode_l1(PLACE | 1 | 1 << 60)
    assert (PLACE, True) == TWO.decode_l1(TWO.encode_l1(PLACE))
    with pytest.raises(DriverError, match="L1 table"):
        TWO.decode_l1(PLACE + 512)


def test_tables_of_version_1() -> None:
    """A word is an offset or a compressed cluster. An offset that is not a cluster's is refused. Nothing is freed."""
    compressed = 1 << 63 | 99
    assert [0, PLACE | OWNED, SPECIAL] == list(ONE.decode_l2(array("Q", [0, PLACE, compressed])))
    assert PLACE == ONE.encode_l2(PLACE | OWNED)
    assert [] == list(ONE.places_of(PLACE))
    assert ((PLACE, True), (0, False), PLACE) == (ONE.decode_l1(PLACE), ONE.decode_l1(0), ONE.encode_l1(PLACE))
    for wrong in (PLACE + 512, PLACE + 1):
        with pytest.raises(DriverError, match="does not point to a cluster"):
            ONE.decode_l2(array("Q", [wrong]))
    with pytest.raises(DriverError, match="L1 table"):
        ONE.decode_l1(PLACE + 1)
