"""Which copies on their way into a cache were overtaken by a write."""

from __future__ import annotations

from random import Random

from xenbackend.block.overtaken import Copy, Overtaken


def test_a_copy_is_old_exactly_if_a_write_of_its_blocks_met_it() -> None:
    """A copy is old if a write to one of its blocks was under way when it began, or began before it ended. A write to a
    neighbour in the same chunk may count too: the block is then read once more.
    """
    chance, overtaken = Random(1), Overtaken()
    writes: list[tuple[int, int]] = []
    copies: list[tuple[Copy, bool]] = []
    missed = 0
    for _ in range(3000):
        first = chance.randrange(2000)
        last = first + chance.choice([0, 0, 3, 40, 5000])
        match chance.randrange(4):
            case 0:
                overtaken.begin(first, last)
                writes.append((first, last))
                copies = [(copy, is_met or (copy.first <= last and first <= copy.last)) for copy, is_met in copies]
            case 1 if writes:
                overtaken.end(*writes.pop(chance.randrange(len(writes))))
            case 2:
                last = min(last, first + 8)
                met = any(start <= last and first <= end for start, end in writes)
                copies.append((overtaken.copy(first, last), met))
            case _ if copies:
                copy, is_met = copies.pop(chance.randrange(len(copies)))
                assert copy.is_old or not is_met
                missed += copy.is_old and not is_met
                overtaken.forget(copy)
        while len(writes) > 3:
            overtaken.end(*writes.pop())

    assert missed < 300


def test_nothing_is_left_of_what_is_over() -> None:
    """Once all copies and writes have ended, nothing of them is kept, however large they were."""
    overtaken = Overtaken()
    copies = [overtaken.copy(block, block + 20) for block in range(0, 100, 7)]
    for last in (5, 10**9):
        overtaken.begin(0, last)
        overtaken.end(0, last)
    for each in copies:
        overtaken.forget(each)

    assert ({}, {}, 0) == (overtaken._copies, dict(overtaken._altering), overtaken._wide)
    assert not overtaken.copy(0, 0).is_old
