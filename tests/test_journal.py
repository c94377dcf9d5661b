"""The journal's memory: its layout, and how it is read, whoever has written it."""

from __future__ import annotations

import errno
import mmap
from array import array

import pytest

from xenbackend import counters, journal
from xenbackend.blkif.abi import LAYOUTS, MAX_RING_ORDER, ring_entries
from xenbackend.journal import (
    BATCH,
    MAX_ENTRIES,
    MAX_RINGS,
    SLOT,
    RingJournal,
    poison,
    poisoned,
)
from xenbackend.units import PAGE

FIRST_RING = 18 * PAGE


@pytest.fixture
def memory() -> memoryview:
    """Memory as the supervisor makes it: zeros, of which only pages in use are allocated."""
    return memoryview(mmap.mmap(-1, journal.SIZE))


def test_every_ring_and_request_fits() -> None:
    """The largest ring and slot of each layout fit into their places in the journal."""
    assert MAX_ENTRIES >= max(ring_entries(layout, MAX_RING_ORDER) for layout in LAYOUTS.values())
    assert SLOT >= max(layout.slot_size for layout in LAYOUTS.values())
    assert counters.SIZE == PAGE


def test_no_two_parts_share_a_byte(memory: memoryview) -> None:
    """The words, blocks, answers and slots of each ring do not overlap each other or the counters."""
    rings = [RingJournal(memory, ring, SLOT) for ring in range(MAX_RINGS)]
    parts = [part for ring in rings for part in (ring.words, ring.blocks, ring.answers)]
    for number, part in enumerate(parts, 1):
        part[0] = part[len(part) - 1] = number
    for ring in rings:
        for place in (ring.block_slots(0), ring.block_slots(MAX_ENTRIES - 1)):
            place[0] = place[-1] = 0xFF

    assert list(range(1, len(parts) + 1)) == [part[0] for part in parts] == [part[-1] for part in parts]
    assert bytes(2 * PAGE) == memory[: 2 * PAGE]
    assert BATCH * SLOT == len(rings[0].block_slots(0))


def test_words_are_aligned(memory: memoryview) -> None:
    """Each word is written by one store, as it begins at a multiple of 8 bytes in page-aligned memory."""
    for ring in range(MAX_RINGS):
        RingJournal(memory, ring, SLOT).words[0] = 0xABCDEF
        end = FIRST_RING + ring * ((journal.SIZE - FIRST_RING) // MAX_RINGS) + PAGE
        place = bytes(memory[:end]).rindex(b"\xef\xcd\xab")

        assert 0 == place % PAGE


def test_begin_forgets_the_last_connection(memory: memoryview) -> None:
    """`begin` leaves nothing in flight in a ring, whatever the journal contained."""
    ring = RingJournal(memory, 0, SLOT)
    ring.blocks[3] = 77 << 8 | 8
    ring.begin(32, 2**32 - 5)

    assert {0} == set(ring.blocks)
    assert [2**32 - 5, 2**32 - 5, 32] == ring.words[:3].tolist()


def test_poison_is_noted_and_taken_back(memory: memoryview) -> None:
    """The errno of a failed flush is readable until it is reset."""
    assert 0 == poisoned(memory)
    poison(memory, 5)
    assert 5 == poisoned(memory)
    poison(memory, 0)
    assert 0 == poisoned(memory)


def test_poison_that_is_no_errno_is_one(memory: memoryview) -> None:
    """Any word in the memory is returned as an errno that has a name."""
    for word in (4096, 2**63, 2**64 - 1):
        poison(memory, word)
        assert errno.EIO == poisoned(memory)


@pytest.mark.parametrize("word", [255, 17, 2**64 - 1, 77 << 8 | BATCH + 1])
@pytest.mark.parametrize("entries", [32, 2**63])
def test_a_block_that_no_batch_fits_is_none(memory: memoryview, entries: int, word: int) -> None:
    """Blocks that no worker of ours would write do not count as in flight; the last block has no entries beyond it."""
    ring = RingJournal(memory, 7, SLOT)
    ring.begin(entries, 100)
    for block in range(MAX_ENTRIES):
        ring.blocks[block] = word

    assert ([], [], 100, [100]) == (ring.unanswered(), ring.answering(), ring.taken(), journal.progress(memory))
    ring.blocks[MAX_ENTRIES - 1] = 99 << 8 | BATCH
    last = MAX_ENTRIES * BATCH
    assert [(99 + place, last - BATCH + place) for place in range(BATCH)] == ring.unanswered()


def test_what_is_in_flight_is_told_from_what_is_answered(memory: memoryview) -> None:
    """INFLIGHT, COMPLETING and FREE entries are distinguished by block, answer and rsp_prod; progress is the oldest."""
    ring = RingJournal(memory, 2, SLOT)
    ring.begin(32, 100)
    ring.blocks[1] = 100 << 8 | 4
    ring.blocks[0] = 104 << 8 | 2
    ring.answers[16:20] = array("Q", [100 << 2 | 1, 0, 101 << 2 | 2, 0])
    ring.words[journal.REQ_CONS] = 104
    ring.words[journal.RSP_PROD] = 101

    assert [(101, 17), (103, 19), (104, 0), (105, 1)] == ring.unanswered()
    assert [(101, 18, 2)] == ring.answering()
    assert 106 == ring.taken()
    assert [101] == journal.progress(memory)
    ring.answers[0:4] = ring.answers[16:20] = array("Q", [1] * 4)
    assert [104] == journal.progress(memory)


def test_release_lets_go(memory: memoryview) -> None:
    """After `release` the memory can be unmapped."""
    ring = RingJournal(memory, 0, SLOT)
    ring.release()
    with pytest.raises(ValueError, match="released"):
        ring.block_slots(0)
