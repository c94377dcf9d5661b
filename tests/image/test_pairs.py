"""Reading the same piece of two disks."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from xenbackend.block.extents import Extent, Kind
from xenbackend.block.spec import parse_chain
from xenbackend.image.pairs import read_pairs, where_either
from xenbackend.image.session import Session

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(20))
def test_what_either_has_is_looked_at(seed: int) -> None:
    """Of two maps, the pieces cover every byte that is data in either map once, and no piece is without such a byte."""
    chance, maps, filled = Random(seed), [], set()
    for _ in range(2):
        extents, start = [], 0
        for _ in range(chance.randrange(1, 20)):
            length, is_hole = chance.randrange(1, 9), chance.random() < 0.2
            kind = chance.choice(list(Kind))
            extents.append(Extent(start, length, kind, is_hole=is_hole))
            filled |= set(range(start, start + length)) if kind is Kind.DATA and not is_hole else set()
            start += length
        maps.append(extents)
    found = [byte for each in where_either(*maps) for byte in range(each.start, each.end)]

    assert sorted(found) == found
    assert filled <= set(found)
    for each in where_either(*maps):
        assert set(range(each.start, each.end)) & filled


def test_behind_a_disk_are_zeros(tmp_path: Path) -> None:
    """Beyond the end of a disk, or without a second disk, a piece is zeros."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1" * (3 * MIB))
    other.write_bytes(b"2" * (MIB + 512))
    with Session() as session:
        disks = [session.open(parse_chain(f"aio:{path}"), read_only=True) for path in (one, other)]
        extents = [Extent(0, 3 * MIB, Kind.DATA)]
        both = b"".join(bytes(theirs) for _, _, theirs in read_pairs(session, disks[0], disks[1], extents))
        alone = [(bytes(mine), bytes(theirs)) for _, mine, theirs in read_pairs(session, disks[0], None, extents)]

    assert other.read_bytes().ljust(3 * MIB, b"\0") == both
    assert [(b"1" * MIB, bytes(MIB))] * 3 == alone
