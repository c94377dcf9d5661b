"""What a guest can make its worker use of the host's memory is at most what the manual's formula says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.driven import Driven
from tests.evil import RAM, Evil, resident
from tests.until import until
from xenbackend import journal
from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE, X86_64
from xenbackend.blkif.request import encode_direct, encode_indirect, encode_segments
from xenbackend.rig.frontend import Wishes
from xenbackend.worker.grants import FREE_SEGMENTS, MAX_PERSISTENT

RINGS, ORDER = 8, 4
SLOW = f"delay:read=1s,write=1s|{RAM}"
KIB, MIB = 1 << 10, 1 << 20
pytestmark = pytest.mark.slow  # each starts a process


def bound(rings: int, slots: int, *, segments: int = 1, pages: int = 0) -> int:
    """Return the bytes by the formula in `docs/performance.md`, "Memory for guests", without arena and `log:`."""
    return 4 * MIB + rings * slots * (5 * KIB + segments * 320) + pages * 3 * KIB


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Driven]:
    """A worker that need not survive the test."""
    with Driven(tmp_path) as driven:
        yield driven
        driven.kill()


def anonymous(driven: Driven) -> int:
    """Return the bytes of memory that are the worker's alone, without the guest's pages."""
    status = Path(f"/proc/{driven.worker.process.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * KIB


def taken(driven: Driven, ring: int) -> int:
    """Return how many requests of a ring the worker has fetched."""
    words = journal.RingJournal(driven.worker.journal, ring, journal.SLOT).words
    return int(words[journal.REQ_CONS])


def wait_until_taken(driven: Driven, wanted: list[int]) -> None:
    """Return once the worker has fetched this many requests of each ring."""
    until(lambda: [taken(driven, ring) for ring in range(len(wanted))] == wanted, "they are not taken")


@pytest.mark.rows("R12")
def test_requests_one_at_a_time(victim: Driven) -> None:
    """R12, L5: on eight rings of the largest order, requests in all slots cost no more than the formula says."""
    victim.connect(SLOW.replace("1s", "30s"), Wishes(queues=RINGS, ring_order=ORDER, persistent=True))
    rings = [Evil(victim, ring) for ring in range(RINGS)]
    size = rings[0].ring.ring.size
    gref, _ = rings[0].page()
    before = resident(victim)
    for number in range(size):
        for evil in rings:
            evil.ring.put_raw(encode_direct(X86_64, BLKIF_OP_READ, number, 0, [(gref, 0, 7)]))
            evil.ring.push()
        wait_until_taken(victim, [number + 1] * RINGS)

    assert resident(victim) - before < bound(RINGS, size)


@pytest.mark.parametrize("segments", [FREE_SEGMENTS, 256])
@pytest.mark.parametrize("operation", [BLKIF_OP_READ, BLKIF_OP_WRITE])
@pytest.mark.rows("R12", "A29")
def test_ragged_requests_on_mapped_pages(victim: Driven, operation: int, segments: int) -> None:
    """R12, A29: longest requests with gaps between segments, in all slots of all rings, on a disk that stalls.

    Those of up to 32 segments are all taken, longer ones as far as the arena has room.
    """
    wishes = Wishes(queues=RINGS, ring_order=ORDER, indirect=256, persistent=True)
    victim.connect(SLOW, wishes)
    rings = [Evil(victim, ring) for ring in range(RINGS)]
    size = rings[0].ring.ring.size
    gref, _ = rings[0].page()
    indirect, content = rings[0].page()
    content[: segments * 8] = encode_segments([(gref, 0, 6)] * segments)
    before = resident(victim)
    largest = 0
    for evil in rings:
        for number in range(size):
            evil.ring.put_raw(encode_indirect(X86_64, operation, number, 0, segments, [indirect]))
        evil.ring.push()
        largest = max(largest, resident(victim))
    while not rings[0].ring.ring.waiting():
        largest = max(largest, resident(victim))
    count = sum(taken(victim, ring) for ring in range(RINGS))

    assert largest - before < bound(RINGS, size, segments=FREE_SEGMENTS)
    assert (count < 200) == (segments > FREE_SEGMENTS), count


@pytest.mark.rows("R12", "A21")
def test_pages_that_stay_mapped(victim: Driven) -> None:
    """R12: the memory for each page of the guest that stays mapped is bounded, and so is the number of such pages."""
    victim.connect(RAM, Wishes(persistent=True))
    evil = Evil(victim)
    grefs = [evil.page()[0] for _ in range(MAX_PERSISTENT + 32)]
    before = anonymous(victim)
    for place in range(0, len(grefs), 32):
        for gref in grefs[place : place + 32]:
            assert [0] == evil.statuses(encode_direct(X86_64, BLKIF_OP_READ, 0, 0, [(gref, 0, 7)]))

    assert victim.xen.held()["pins"] >= MAX_PERSISTENT
    assert anonymous(victim) - before < bound(1, 32, pages=MAX_PERSISTENT)
