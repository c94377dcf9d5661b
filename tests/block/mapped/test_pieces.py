"""Tests of `xenbackend.block.mapped.pieces`."""

from __future__ import annotations

from random import Random

import pytest

from tests.helpers_block import read, write
from xenbackend.block.mapped.pieces import Piece, Shape, Way, pieces_of
from xenbackend.block.mapped.tables import OWNED, READABLE, SPECIAL, ZERO
from xenbackend.block.request import Op

SHAPE = Shape(12, 2)  # tables of four clusters of 4 KiB
TABLES = {
    0: [8192 | OWNED, 12288 | OWNED, 65536 | OWNED, 0],
    1: [0, ZERO, ZERO | 4096, 20480 | READABLE],
    2: [SPECIAL, SPECIAL, 0, 0],
}


def cut(op: int, offset: int, length: int) -> list[Piece]:
    """Return the pieces of a request to a disk whose fourth table does not exist."""
    request = read(offset, length) if op == Op.READ else write(offset, bytes(length))
    return pieces_of(request, TABLES.get, SHAPE)


def test_reads() -> None:
    """Each kind of cluster is handled in its own way. Clusters adjacent in the file, or all absent, make one piece."""
    assert [(Way.FILE, 8704, 1024)] == cut(Op.READ, 512, 1024)
    assert [
        (Way.FILE, 8704, 7680), (Way.FILE, 65536, 4096), (Way.PARENT, 0, 8192), (Way.ZEROS, 0, 8192),
        (Way.FILE, 20480, 4096), (Way.SPECIAL, 0, 4096), (Way.SPECIAL, 0, 4096), (Way.PARENT, 0, 8192),
        (Way.LOAD, 3, 512),
    ] == cut(Op.READ, 512, 12 * 4096)  # fmt: skip


def test_writes() -> None:
    """Clusters that may not be overwritten make one piece up to the end of their table, whatever their kind."""
    assert [
        (Way.FILE, 8192, 8192), (Way.FILE, 65536, 4096), (Way.ELSEWHERE, 0, 4096), (Way.ELSEWHERE, 1, 16384),
        (Way.ELSEWHERE, 2, 16384), (Way.LOAD, 3, 4096),
    ] == cut(Op.WRITE, 0, 13 * 4096)  # fmt: skip


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_nothing_is_lost(op: Op) -> None:
    """The pieces of any request add up to its length, and none is empty."""
    chance = Random(1)
    for _ in range(500):
        offset, length = 512 * chance.randrange(100), 512 * chance.randint(1, 60)
        lengths = [piece[2] for piece in cut(op, offset, length)]

        assert length == sum(lengths)
        assert 0 not in lengths
