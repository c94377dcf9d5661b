"""A worker that was taken over writes anything into its journal: what the supervisor reads from it.

Each case ends with a value or None, in bounded time and memory. `--requests` sets how many cases there are.
"""

from __future__ import annotations

import mmap
import os
import random
import resource
import time
from collections.abc import Callable, Iterator

import pytest

from tests.supervisor.helpers import PATH
from xenbackend import counters, journal
from xenbackend.note import MAGIC
from xenbackend.protocol import codec
from xenbackend.protocol.messages import Agreed, Connect, RingParameters
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd import former
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.notes import Exchange
from xenbackend.units import PAGE

CONNECT = Connect("x86_64-abi", [RingParameters([8, 9], 3)] * 2, persistent=True)
CHAINS = ("null:1G", "null:2G", "aio:/etc/shadow", "")
WORDS = [0, 1, 2, 3, 16, 17, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 100 << 8 | 16, 2**63 | 16]
PIECES = [
    b"[", b"{", b'{"chain":', b'"chain": "null:2G"', b"\0", b"\xff", b'"\\ud800"', b"9" * 5000, b"1e999", b"NaN", b",",
]  # fmt: skip
MAX_SECONDS = 0.5  # of the CPU, for one case
MAX_GROWTH = 128 << 10  # KiB


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers, the same in each run."""
    return random.Random(request.config.getoption("--seed"))


@pytest.fixture
def handover() -> Iterator[Handover]:
    """The handover of a disk that is served while its chain is being exchanged."""
    handover = Handover(Keeper({}), PATH)
    handover.descriptors(CHAINS[0])
    handover.note(exchange=Exchange(1, CHAINS[0], CHAINS[1]), paused="root")
    yield handover
    handover.close()


def endure(count: int, spoil: Callable[[], None], look: Callable[[], object]) -> set[object]:
    """Spoil a memory and look at it `count` times; return what was seen."""
    before, slowest, seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, set()
    for _ in range(count):
        spoil()
        begin = time.process_time()
        seen.add(look())
        slowest = max(slowest, time.process_time() - begin)
    assert slowest < MAX_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH
    return seen


@pytest.mark.slow
def test_any_agreement(request: pytest.FixtureRequest, dice: random.Random, handover: Handover) -> None:
    """Whatever a worker notes as in service, the supervisor reads a chain that it ordered, or nothing."""
    page = handover.page
    texts = []
    for chain in CHAINS:
        journal.AGREED.write(page, codec.as_fields(Agreed(chain, CONNECT)))
        at = (2 if page[PAGE : PAGE + 24].cast("Q")[2] == 1 else 10) * PAGE
        length = int.from_bytes(page[at : at + 8], "little")
        texts.append(bytes(page[at + 8 : at + 8 + length]))

    def spoil() -> None:
        text = bytearray(dice.choice(texts))
        for _ in range(dice.choice((0, 0, 1, 1, 2, 20))):
            place = dice.randrange(len(text) + 1)
            piece = dice.choice(PIECES) * dice.choice((*[1] * 20, 900, 990))
            text[place : place + dice.choice((0, len(piece)))] = piece
        del text[8 * PAGE - 8 :]
        length = dice.choice([len(text)] * 9 + [len(text) + 1, 2**64 - 1])
        at = dice.choice((2, 10)) * PAGE
        page[at : at + 8] = length.to_bytes(8, "little")
        page[at + 8 : at + 8 + len(text)] = text
        words = page[PAGE : 2 * PAGE].cast("Q")
        words[0], words[1], words[2], words[3] = MAGIC, journal.VERSION, 1 if at == 2 * PAGE else 2, 0
        if not dice.randrange(10):
            words[dice.randrange(4)] = dice.choice(WORDS)

    def look() -> object:
        agreed = handover.agreed()
        assert 0 <= journal.poisoned(page) < 4096
        assert agreed is None or agreed.chain in CHAINS[:2]
        return agreed and agreed.chain, handover.chain_in_service()

    expected = {(None, CHAINS[0]), (CHAINS[0], CHAINS[0]), (CHAINS[1], CHAINS[1])}
    assert expected == endure(request.config.getoption("--requests") // 5, spoil, look)


def test_any_rings(request: pytest.FixtureRequest, dice: random.Random, handover: Handover) -> None:
    """Whatever the rings and counters hold, each ring has valid numbers, and each counter a word."""
    page = handover.page
    starts = [journal.RINGS_AT + ring * journal.RING_SIZE for ring in range(journal.MAX_RINGS)]

    def spoil() -> None:
        start = dice.choice(starts)
        words = page[start : start + journal.SCRATCH_AT].cast("Q")
        words[journal.RING_ENTRIES] = dice.choice(WORDS)
        words[dice.randrange(3)] = dice.choice(WORDS)
        for _ in range(20):
            words[512 + dice.randrange(512)] = dice.choice((dice.choice(WORDS), 0, dice.getrandbits(64)))
            words[1024 + dice.randrange(8192)] = dice.choice((dice.choice(WORDS), dice.getrandbits(64)))
        page[: counters.SIZE].cast("Q")[dice.randrange(512)] = dice.choice(WORDS)

    def look() -> object:
        found = journal.progress(page)
        ring = journal.RingJournal(page, dice.randrange(journal.MAX_RINGS), journal.SLOT)
        assert all(entry < 8192 for _, entry in ring.unanswered())
        assert all(entry < 8192 and answer < 4 for _, entry, answer in ring.answering())
        assert 0 <= ring.taken() < 2**64
        ring.release()
        assert len(counters.NAMES) == len(counters.snapshot(page))
        assert 0 <= counters.percentile_ns(counters.histogram(page), dice.random()) < 2**counters.BUCKETS
        assert all(0 <= each < 2**64 for each in found)
        return len(found)

    seen = endure(request.config.getoption("--requests") // 200, spoil, look)
    assert journal.MAX_RINGS in seen


def test_any_journal_of_the_release_before(request: pytest.FixtureRequest, dice: random.Random) -> None:
    """The notes of the last release, which its worker could overwrite, are read without an error whatever they hold."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, 50 * PAGE)
    page = memoryview(mmap.mmap(fd, 50 * PAGE))
    note = former._NOTES
    plain = {
        "chain": CHAINS[0],
        "swap": {"from": "a", "to": "b"},
        "paused": True,
        "memories": {"m0": "x"},
        "policy": "p",
    }

    def spoil() -> None:
        note.write(page, plain)
        at = (18 if page[PAGE : 2 * PAGE].cast("Q")[3] == 1 else 34) * PAGE
        for _ in range(dice.choice((0, 1, 1, 2, 20))):
            piece = dice.choice(PIECES) * dice.choice((1, 1, 1000))
            place = at + dice.choice((0, 8, 8 + dice.randrange(120)))
            page[place : place + len(piece)] = piece[: 50 * PAGE - place]
            if not dice.randrange(3):
                page[at : at + 8] = dice.choice((200, 6000, 65528, 2**63)).to_bytes(8, "little")

    def look() -> object:
        return former.read_notes(fd).chain

    assert {CHAINS[0], ""} <= endure(request.config.getoption("--requests") // 20, spoil, look)
    os.close(fd)
