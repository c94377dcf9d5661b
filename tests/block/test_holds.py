"""Blocks that a request is altering, which other requests have to wait for."""

from __future__ import annotations

from random import Random

from tests.helpers_block import write
from xenbackend.block.holds import Holds
from xenbackend.block.request import Op


def test_whoever_comes_finds_who_is_there() -> None:
    """Of a thousand random holds, discards included, each finds another one exactly if they have a block in common."""
    chance, holds = Random(1), Holds()
    held: list[tuple[int, int, int]] = []
    for _ in range(1000):
        first = chance.randrange(200)
        last = first + chance.choice([0, 0, 1, 5, 100])
        op = chance.choice([Op.WRITE, Op.DISCARD])
        met = any(start <= last and first <= end for _, start, end in held)
        assert met == (holds.find(first, last) is not None)
        if not met:
            holds.add(op, first, last)
            held.append((op, first, last))
        if held and chance.random() < 0.6:
            holds.remove(*held.pop(chance.randrange(len(held))))


def test_what_waited_is_returned_once() -> None:
    """A request that waits for a hold is returned once, when that hold is removed."""
    holds, request = Holds(), write(0, bytes(512))
    holds.add(Op.WRITE, 3, 5)
    found = holds.find(5, 9)
    assert found is not None
    found.waiting.append(request)

    assert [request] == holds.remove(Op.WRITE, 3, 5)
    assert holds.find(0, 100) is None
