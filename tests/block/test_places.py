"""Where blocks of a disk were found lately in a cache's file."""

from __future__ import annotations

from random import Random

import pytest

from xenbackend.block import places
from xenbackend.block.places import Places

START, BLOCK = 8192, 4096


def test_bytes_of_one_block_are_found_at_their_place() -> None:
    """Bytes of a block that was put are found in its slot; those of two blocks, or of another one, are not."""
    index = Places(8, 12, START)
    index.put(5, 3)
    index.put(6, 4)

    assert START + 3 * BLOCK == index.find(5 * BLOCK, BLOCK)
    assert START + 3 * BLOCK + 3584 == index.find(5 * BLOCK + 3584, 512)
    assert [-1, -1] == [index.find(5 * BLOCK + 3584, 1024), index.find(4 * BLOCK, 512)]
    assert -1 == index.find(0, 0), "a flush"


@pytest.mark.parametrize("slots", [1, 3, 10, 64])
def test_no_block_is_found_in_the_slot_of_another_one(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Under random calls a block is found in the slot that it got last, or not at all, though blocks share entries."""
    monkeypatch.setattr(places, "_LEAST", 8)
    chance, index, content = Random(slots), Places(slots, 12, START), dict[int, int]()  # by slot
    assert max(8, slots) == len(index.shifts)
    found = 0
    for _ in range(500):
        block, slot = chance.choice([chance.randrange(40), chance.randrange(1 << 40)]), chance.randrange(slots)
        match chance.randrange(40):
            case 0:
                index.clear()
                assert -1 == index.find(block * BLOCK, 512)
            case less if less < 8:
                index.drop(block)
                assert -1 == index.find(block * BLOCK, 512)
            case _:
                index.drop(content.get(slot, -1))
                content = {each: other for each, other in content.items() if other != block} | {slot: block}
                index.put(block, slot)
                assert START + slot * BLOCK == index.find(block * BLOCK, BLOCK)
        for each in (*content.values(), *range(40)):
            place = index.find(each * BLOCK, BLOCK)
            found += place >= 0
            assert place < 0 or each == content[(place - START) // BLOCK]
    assert found
