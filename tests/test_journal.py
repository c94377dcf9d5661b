"""The journal's memory: its layout, and what a reader finds in one that nobody or somebody wrote."""

from __future__ import annotations

import mmap

import pytest

from xenbackend import counters, journal
from xenbackend.blkif.abi import LAYOUTS, MAX_RING_ORDER, ring_entries
from xenbackend.journal import BATCH, MAX_ENTRIES, MAX_RINGS, SEGMENTS, SLOT, RingJournal
from xenbackend.units import PAGE


@pytest.fixture
def memory() -> memoryview:
    """Memory as the supervisor makes it: zeros, of which only what is used exists."""
    return memoryview(mmap.mmap(-1, journal.SIZE))


def test_every_ring_and_request_fits() -> None:
    """The largest ring of either layout, and its slot, fit into the places that the journal has for them."""
    assert MAX_ENTRIES >= max(ring_entries(layout, MAX_RING_ORDER) for layout in LAYOUTS.values())
    assert SLOT >= max(layout.slot_size for layout in LAYOUTS.values())
    assert counters.SIZE == PAGE


def test_no_two_parts_share_a_byte(memory: memoryview) -> None:
    """Each ring's words, blocks, answers, slots and segments lie apart from each other and from the counters."""
    rings = [RingJournal(memory, ring, SLOT) for ring in range(MAX_RINGS)]
    parts = [part for ring in rings for part in (ring.words, ring.blocks, ring.answers)]
    for number, part in enumerate(parts, 1):
        part[0] = part[len(part) - 1] = number
    last = MAX_ENTRIES * BATCH - 1
    for ring in rings:
        for place in (ring.block_slots(0), ring.block_slots(MAX_ENTRIES - 1), ring.segments(0), ring.segments(last)):
            place[0] = place[-1] = 0xFF

    assert list(range(1, len(parts) + 1)) == [part[0] for part in parts] == [part[-1] for part in parts]
    assert bytes(2 * PAGE) == memory[: 2 * PAGE]
    assert (BATCH * SLOT, SEGMENTS) == (len(rings[0].block_slots(0)), len(rings[0].segments(0)))


def test_words_are_aligned(memory: memoryview) -> None:
    """Each word is one store: it begins at a multiple of 8 bytes in a page-aligned memory."""
    for ring in range(MAX_RINGS):
        RingJournal(memory, ring, SLOT).words[0] = 0xABCDEF
        place = bytes(memory[: 2 * PAGE + ring * (journal.SIZE // MAX_RINGS) + PAGE]).rindex(b"\xef\xcd\xab")

        assert 0 == place % PAGE


def test_begin_forgets_the_last_connection(memory: memoryview) -> None:
    """A ring that is begun afresh has nothing in flight, whatever the journal said before."""
    ring = RingJournal(memory, 0, SLOT)
    ring.blocks[3] = 77 << 8 | 8
    ring.begin(32, 2**32 - 5)

    assert {0} == set(ring.blocks)
    assert [2**32 - 5, 2**32 - 5, 32] == ring.words[:3].tolist()


def test_header_is_found_again(memory: memoryview) -> None:
    """What was agreed is read back as it was written; a shorter one replaces a longer one whole."""
    journal.write_header(memory, {"vbd": "vbd/5/51712", "rings": list(range(100))})
    journal.write_header(memory, {"vbd": "ä"})

    assert {"vbd": "ä"} == journal.read_header(memory)


def test_memory_that_no_worker_wrote_has_no_header(memory: memoryview) -> None:
    """Zeros, another version or an impossible length are nobody's header."""
    assert journal.read_header(memory) is None
    for word, value in ((0, 1), (1, 99), (2, PAGE)):
        journal.write_header(memory, {})
        memory[PAGE : PAGE + 24].cast("Q")[word] = value
        assert journal.read_header(memory) is None


def test_header_that_is_too_long_is_refused(memory: memoryview) -> None:
    """More than a page of agreement is an error, and nothing was written."""
    with pytest.raises(ValueError, match="do not fit"):
        journal.write_header(memory, {"x": "y" * PAGE})
    assert journal.read_header(memory) is None


def test_release_lets_go(memory: memoryview) -> None:
    """After `release` the memory can be unmapped."""
    ring = RingJournal(memory, 0, SLOT)
    ring.release()
    with pytest.raises(ValueError, match="released"):
        ring.segments(0)
