"""The map of a cache: which slot holds which block."""

from __future__ import annotations

from random import Random

import pytest

from tests.helpers_block import StepEnv
from xenbackend.block.cache_map import WAYS, CacheMap


def _map(env: StepEnv, slots: int, token: bytes) -> CacheMap:
    return CacheMap(env, slots, token, block=4096, data_at=8192)


def _use(known: CacheMap, block: int) -> None:
    """Look a block up, and put it into a slot if it is in none, as a read does."""
    if known.find(block) < 0:
        slot = known.take(block)
        known.put(slot, block)
        known.pins[slot] -= 1


def test_it_is_a_dictionary_that_forgets() -> None:
    """Under random calls, a lookup finds the slot where the block was put last, if no other block has had it since."""
    chance, known = Random(1), _map(StepEnv(), 64, b"t")
    content: dict[int, int] = {}  # by slot, the block whose bytes are there
    for _ in range(5000):
        block = chance.randrange(200)
        slot = known.find(block)
        assert slot < 0 or content[slot] == block
        places = [known.places.find(each << 12, 4096) for each in range(204)]
        assert all(place < 0 or known.find(each) == place - 8192 >> 12 for each, place in enumerate(places))
        match chance.randrange(3):
            case 0:
                known.drop(block, block + 3)
                assert known.find(block + 3) == -1
            case _ if slot < 0:
                slot = known.take(block)
                content[slot] = block
                known.put(slot, block)
                known.pins[slot] -= 1
                assert known.find(block) == slot


def test_a_successor_finds_what_was_put_and_nothing_that_was_only_taken() -> None:
    """D11: a successor finds the blocks that were put, and none in slots that were only taken."""
    env = StepEnv()
    known = _map(env, 64, b"t")
    first, second = known.take(1), known.take(2)
    known.put(first, 1)
    later = _map(env, 64, b"t")

    assert (first, -1) == (later.find(1), later.find(2))
    assert second >= 0
    assert -1 == _map(env, 64, b"of another disk").find(1)


def test_a_pinned_slot_is_not_given_away() -> None:
    """A slot that is being read or written is not given away. If all slots of a set are, nothing is kept."""
    known = _map(StepEnv(), WAYS, b"t")
    slots = [known.take(block) for block in range(WAYS)]
    assert -1 == known.take(100)
    known.pins[slots[3]] += 1
    known.pins[slots[3]] -= 1
    assert -1 == known.take(100)
    known.pins[slots[3]] -= 1

    assert slots[3] == known.take(100)


def test_what_is_used_stays() -> None:
    """A block that was looked up since the hand came round last outlives those that were not."""
    known = _map(StepEnv(), WAYS, b"t")
    for block in range(40):
        known.find(0)
        _use(known, block)
    assert known.find(0) >= 0
    assert [-1, -1] == [known.find(1), known.find(30)]
    assert all(known.find(block) >= 0 for block in range(34, 40)), "those that came last, whatever slots they got"


def test_a_block_is_in_one_slot_at_most() -> None:
    """If one block was copied into two slots at the same time, one of them is kept. Dropping the block removes it."""
    known = _map(StepEnv(), WAYS, b"t")
    for slot in (known.take(5), known.take(5)):
        known.put(slot, 5)
        known.pins[slot] -= 1
    known.drop(5, 5)

    assert -1 == known.find(5)


@pytest.mark.parametrize("way", ["by its place", "by looking for it"])
def test_a_block_that_is_found_again_and_again_stays(way: str) -> None:
    """A block that is found again and again is kept, although a lookup by its cached place does not mark it as used."""
    known = _map(StepEnv(), WAYS, b"t")
    for block in range(200):
        if way == "by looking for it" or known.places.find(0, 4096) < 0:
            known.find(0)
        _use(known, block)

    assert known.find(0) >= 0


def test_a_slot_that_is_given_to_another_block_is_no_place_of_the_former_one() -> None:
    """A slot that is given to another block is not found for its former one, even if that was looked up just before."""
    known = _map(StepEnv(), WAYS, b"t")
    slot = known.take(1)
    known.put(slot, 1)
    assert slot == known.find(1)
    known.restore(slot, 2)

    assert (-1, slot) == (known.find(1), known.find(2))
    assert [-1, 8192 + (slot << 12)] == [known.places.find(block << 12, 4096) for block in (1, 2)]


def test_what_was_cleared_has_no_place() -> None:
    """Once the map was cleared, nothing is found in the file any more, neither by the map nor by a cached place."""
    known = _map(StepEnv(), 64, b"t")
    known.put(known.take(1), 1)
    assert known.find(1) >= 0
    known.clear()

    assert (-1, -1) == (known.places.find(4096, 4096), known.find(1))


@pytest.mark.parametrize("slots", [1, 7, 8, 1000])
def test_there_are_whole_sets(slots: int) -> None:
    """Slots come in whole sets. Their number is rounded down, but there is at least one set."""
    assert _map(StepEnv(), slots, b"t").slots == max(WAYS, slots // WAYS * WAYS)


def test_an_empty_map_is_not_emptied_again() -> None:
    """A map that has no entries is not written again when it is cleared: fstrim sends many large discards in a row. One
    that a predecessor left, or that got an entry since, is.
    """
    env = StepEnv()
    known = _map(env, 64, b"t")
    _use(known, 1)
    later = _map(env, 64, b"t")
    later.clear()
    assert -1 == later.find(1)
    for block in (2, 3):
        _use(later, block)
        later.clear()
        assert [-1, -1] == [later.find(block), later.places.find(block << 12, 4096)]

    shifts = later.places.shifts
    written = shifts[0] = 5  # nobody else writes there: so we see whether it is cleared
    later.clear()
    assert written == shifts[0]
    _use(later, 4)
    later.clear()
    assert -1 == later.find(4)
    assert (written != shifts[0], shifts is later.places.shifts) == (True, True), "in place, and not in new memory"
