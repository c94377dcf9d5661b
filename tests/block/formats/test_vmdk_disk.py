"""The tables of a disk in several extents."""

from __future__ import annotations

from random import Random

import pytest

from tests.foreign_images import GRAIN, MIB, cowd, vmdk
from xenbackend.block.formats.vmdk import Image, parse, parse_cowd
from xenbackend.block.formats.vmdk_descriptor import parse as parse_descriptor
from xenbackend.block.formats.vmdk_disk import Disk, Piece
from xenbackend.block.mapped.tables import PLACE, READABLE, ZERO
from xenbackend.errors import DriverError

NO_TEXT = parse_descriptor(b"")


def sparse(data: bytes) -> Image:
    """Return the parsed header of a sparse extent."""
    return parse(lambda offset, length: data[offset : offset + length], len(data), is_part=True)


def entries(disk: Disk, files: dict[int, bytes]) -> list[int]:
    """Return all entries of a disk. `files` has their content by the extents' bases."""
    found: list[int] = []
    for number in range(disk.shape.tables):
        needs = disk.needs(number)
        pieces = []
        for need in needs:
            place = need.place - need.piece.base
            pieces.append(files[need.piece.base][place : place + need.length])
        found += disk.table(number, pieces)
    return found[: -(-disk.shape.size >> disk.shape.cluster_bits)]


def test_flat_extents_follow_one_another() -> None:
    """A cluster is where its extent has it in the file. Clusters are as large as the borders between extents allow."""
    disk = Disk(
        [Piece(0, 3 * 4096, 512), Piece(3 * 4096, 8192, 1 << 30), Piece(5 * 4096, 512, 0, is_zeros=True)], NO_TEXT
    )

    assert (5 * 4096 + 512, 12) == (disk.shape.size, disk.shape.cluster_bits)
    expected = [512, 4608, 8704, 1 << 30, (1 << 30) + 4096]
    assert [*(each | READABLE for each in expected), ZERO] == entries(disk, {})


def test_tables_of_extents_need_not_begin_where_those_of_the_disk_do() -> None:
    """Extents with any number of grains give the right entry for each grain, whatever the borders of their tables."""
    chance = Random(1)
    pieces, files, expected = [], {}, []
    start, base = 0, 0
    for grains in (511, 3, 1025, 512, 1):
        data = vmdk(grains * GRAIN, {each: b"" for each in range(grains) if chance.random() < 0.5})
        image = sparse(data + bytes(GRAIN))
        pieces.append(Piece(start, grains * GRAIN, base, image))
        files[base] = data
        table = []
        for number in range(image.shape.tables):
            place, length = image.table_at(number)
            table += image.decode(data[place : place + length])
        expected += [each + base if each & PLACE else each for each in table[:grains]]
        start, base = start + grains * GRAIN, base + (1 << 30)

    assert expected == entries(Disk(pieces, NO_TEXT), files)
    assert 0 < sum(map(bool, expected)) < len(expected)


def test_a_table_that_is_not_there_needs_nothing() -> None:
    """If an extent has no table, its grains come from the parent."""
    data = bytearray(vmdk(64 * MIB, {}))
    data[21 * 512 : 21 * 512 + 4] = bytes(4)
    disk = Disk([Piece(0, 64 * MIB, 0, sparse(bytes(data)))], NO_TEXT)

    assert [0, 1] == [len(disk.needs(number)) for number in (0, 1)]


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ([Piece(0, 2 * MIB, 0, sparse(vmdk(MIB, {})))], "an extent of 2097152 bytes is in a file for 1048576"),
        ([Piece(0, 512, 0), Piece(512, MIB, 0, sparse(vmdk(MIB, {})))], "or begin inside of one"),
        (
            [
                Piece(0, MIB, 0, sparse(vmdk(MIB, {}))),
                Piece(MIB, MIB, 0, parse_cowd(lambda place, length: cowd(MIB, {})[place : place + length], 1 << 20)),
            ],
            "grains of several sizes",
        ),
    ],
)
def test_extents_that_do_not_fit(pieces: list[Piece], sentence: str) -> None:
    """Extents that are too short, or whose grains do not line up, are refused."""
    with pytest.raises(DriverError, match=sentence):
        Disk(pieces, NO_TEXT)
