"""Splits a request into pieces, one for each stretch of it that goes the same way.

Must not send anything, nor load a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from xenbackend.block.mapped.tables import PLACE, SPECIAL, ZERO, Table
from xenbackend.block.request import Op, Request
from xenbackend.units import SECTOR


class Way(IntEnum):
    """Where a piece goes."""

    FILE = 0  # to its place in the file
    PARENT = 1
    ZEROS = 2
    SPECIAL = 3  # the format reads it
    ELSEWHERE = 4  # the format writes it, somewhere
    LOAD = 5  # not known: its table has to be loaded first


Piece = tuple[Way, int, int]  # the way; the place in the file, or the table's number; the length in bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """A cluster has 2 to the power of `cluster_bits` bytes, and a table 2 to the power of `table_bits` entries."""

    cluster_bits: int
    table_bits: int


def pieces_of(request: Request, find: Callable[[int], Table | None], shape: Shape) -> list[Piece]:
    """Return the pieces of a read or write, in order; neighbours that go the same way are merged.

    The search stops at a cluster whose table has to be loaded, and the rest is one piece. The pieces before it can be
    sent at once, so there is progress even if very few tables are kept.
    """
    cluster, table_shift = 1 << shape.cluster_bits, shape.cluster_bits + shape.table_bits
    offset, end = request.offset, request.offset + request.length
    pieces: list[Piece] = []
    number, table = -1, None
    while offset < end:
        if offset >> table_shift != number:
            number = offset >> table_shift
            table = find(number)
        if table is None:
            pieces.append((Way.LOAD, number, end - offset))
            break
        inside = offset & cluster - 1
        entry = table[(offset >> shape.cluster_bits) - (number << shape.table_bits)]
        way, place = _way(request.op, entry, inside, number)
        length = min(cluster - inside, end - offset)
        _add(pieces, way, place, length)
        offset += length
    return pieces


def _way(op: int, entry: int, inside: int, table: int) -> tuple[Way, int]:
    """Return the way of a piece of one cluster, and a place that decides whether the next piece can be merged."""
    if entry >> op & 1:
        return Way.FILE, (entry & PLACE) + inside
    if op == Op.WRITE:
        return Way.ELSEWHERE, table
    if entry & SPECIAL:
        return Way.SPECIAL, 0
    return (Way.ZEROS if entry & ZERO else Way.PARENT), 0


def _add(pieces: list[Piece], way: Way, place: int, length: int) -> None:
    """Add a piece; merge it with the last one if it goes the same way and, in the file, directly follows it."""
    if pieces and way != Way.SPECIAL:
        last_way, last_place, last_length = pieces[-1]
        if last_way == way and place == (last_place + last_length if way == Way.FILE else last_place):
            pieces[-1] = way, last_place, last_length + length
            return
    pieces.append((way, place, length))


def runs_of(present: bytearray, first: int, last: int) -> list[int]:
    """Return the length in bytes of each run of equal values among the sectors `first` to `last`, excluded."""
    lengths = []
    while first < last:
        after = present.find(1 - present[first], first, last)
        after = last if after < 0 else after
        lengths.append((after - first) * SECTOR)
        first = after
    return lengths
