"""A ring taken over from a dead worker: every order of events in a small ring, and what a hostile guest does.

`make test-model` searches larger rings, with `tests/explore`.
"""

from __future__ import annotations

import mmap

import pytest

from tests.explore.patches import WRONG, make_wrong, use_words
from tests.explore.search import Bounds, Found, Search
from xenbackend import journal
from xenbackend.blkif.abi import (
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    RSP_PROD,
    X86_64,
    Layout,
)
from xenbackend.blkif.request import encode_direct, encode_indirect
from xenbackend.blkif.ring import BackRing, FrontRing, RingOverflow
from xenbackend.journal import ANSWER_EOPNOTSUPP, ANSWER_ERROR, ANSWER_OKAY, BATCH, REQ_CONS
from xenbackend.units import PAGE
from xenbackend.worker.recovery import recover

STARTS = [0, 2**32 - 3]
SMALL = Bounds(slots=2, requests=3, kills=1, limits=(1, 2))


def explore(patch: pytest.MonkeyPatch, bounds: Bounds, wrong: str = "") -> Found:
    """Search all that can happen within `bounds`, with the code as it is, or wrong in one way."""
    use_words(patch, bounds.slots)
    make_wrong(patch, WRONG.get(wrong, []))
    return Search(bounds, stops=bool(wrong)).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(slots=2, requests=3, kills=2, limits=(1, 2), start=STARTS[1] + 1),
        Bounds(slots=2, requests=3, kills=1, limits=(1, 2), everywhere=True),
    ],
    ids=str,
)
def test_nothing_is_lost_repeated_or_overwritten(monkeypatch: pytest.MonkeyPatch, bounds: Bounds) -> None:
    """Whatever guest and disk do, and wherever workers die, even during recovery, each request is done and then
    answered once.
    """
    found = explore(monkeypatch, bounds)

    assert {} == found.violations, found.path
    assert found.states > 10_000
    assert found.ends > 100


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_known_to_be_wrong_is_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Each known way to get recovery wrong is found by the search, so that its silence means something."""
    assert explore(monkeypatch, SMALL, wrong).violations


class Left:
    """What a predecessor has left: a ring, and a journal whose blocks the test writes."""

    def __init__(self, start: int = 0, layout: Layout = X86_64) -> None:
        pages = memoryview(mmap.mmap(-1, PAGE))
        self.layout = layout
        self.front = FrontRing(pages, layout, 32, lambda: None)
        self.front.start_at(start)
        self.back = BackRing(pages, layout, 32, lambda: None)
        self.journal = journal.RingJournal(memoryview(mmap.mmap(-1, journal.SIZE)), 0, layout.slot_size)
        self.journal.begin(32, start)
        self.start = start

    def take(self, block: int, first: int, *slots: bytes, answers: tuple[int, ...]) -> None:
        """Write a block of requests that were taken, the first with number `first`, and its answer words."""
        for slot in slots:
            self.front.put(slot)
        self.front.push()
        self.journal.block_slots(block)[: len(slots) * self.layout.slot_size] = b"".join(slots)
        self.journal.answers[block * BATCH] = 0
        for place, word in enumerate(answers):
            self.journal.answers[block * BATCH + place] = word
        self.journal.blocks[block] = self.start + first << 8 | len(slots)

    def slot(self, guest_id: int, operation: int = BLKIF_OP_READ) -> bytes:
        """Return a request."""
        return encode_direct(self.layout, operation, guest_id, 8, [(9, 0, 7)])

    def answer(self, number: int, answer: int) -> int:
        """Return an answer word."""
        return self.start + number << 2 | answer

    def reap(self) -> list[tuple[int, int, int]]:
        """Return (id, operation, status) of each published response."""
        return [self.front.take()[:3] for _ in range(self.front.waiting())]


@pytest.mark.parametrize("start", STARTS)
def test_what_was_begun_is_finished_in_order(start: int) -> None:
    """Answers that were begun and not published are written again in order, with their id, operation and status."""
    left = Left(start)
    words = [left.answer(2, ANSWER_OKAY), left.answer(0, ANSWER_ERROR), 0, left.answer(1, ANSWER_EOPNOTSUPP)]
    slots = [left.slot(7), left.slot(8, BLKIF_OP_WRITE), left.slot(9), left.slot(10, BLKIF_OP_WRITE)]
    left.take(3, 0, *slots, answers=tuple(words))
    found = recover(left.back, left.journal)

    assert [3 * BATCH + 2] == found
    assert [
        (8, BLKIF_OP_WRITE, BLKIF_RSP_ERROR),
        (10, BLKIF_OP_WRITE, BLKIF_RSP_EOPNOTSUPP),
        (7, BLKIF_OP_READ, BLKIF_RSP_OKAY),
    ] == left.reap()
    assert [start + 4, start + 3] == left.journal.words[:2].tolist()
    assert (start + 4, start + 3) == (left.back.consumed, left.back.answered)


def test_an_indirect_request_is_answered_by_its_inner_operation() -> None:
    """An indirect request is answered with its inner operation: for any other a frontend would disable the disk."""
    left = Left()
    slot = encode_indirect(X86_64, BLKIF_OP_WRITE, 5, 8, 2, [9])
    left.take(0, 0, slot, answers=(left.answer(0, ANSWER_OKAY),))
    recover(left.back, left.journal)

    assert [(5, BLKIF_OP_WRITE, BLKIF_RSP_OKAY)] == left.reap()


def test_what_was_taken_and_not_counted_is_counted() -> None:
    """A batch that was noted right before the worker's death is done, and not taken from the ring again."""
    left = Left()
    left.take(1, 0, left.slot(1), left.slot(2), answers=(0, 0))
    found = recover(left.back, left.journal)

    assert [BATCH, BATCH + 1] == found
    assert (2, 0) == (left.journal.words[REQ_CONS], left.back.available())


def test_unanswered_requests_come_in_the_order_of_the_ring() -> None:
    """Unanswered requests are done in the order in which they were taken, whichever blocks hold them."""
    left = Left()
    for block, first in ((2, 0), (0, 1), (1, 2)):
        left.take(block, first, left.slot(first), answers=(0,))

    assert [2 * BATCH, 0, BATCH] == recover(left.back, left.journal)


@pytest.mark.parametrize("moved", [-1, 2, 5, 2**31])
def test_a_response_index_that_is_not_ours_is_refused(moved: int) -> None:
    """If the guest has moved our response index beyond the answers that were begun, that is an error, and nothing is
    written.
    """
    left = Left()
    left.take(0, 0, left.slot(1), left.slot(2), answers=(left.answer(0, ANSWER_OKAY), 0))
    left.front.index[RSP_PROD] = moved & 0xFFFF_FFFF
    before = (bytes(left.front.pages), left.journal.words.tolist(), left.journal.answers.tolist())
    with pytest.raises(RingOverflow, match=f"by {moved & 0xFFFF_FFFF}, of 1 answers"):
        recover(left.back, left.journal)

    assert before == (bytes(left.front.pages), left.journal.words.tolist(), left.journal.answers.tolist())


@pytest.mark.parametrize("published", [0, 1, 2])
def test_what_was_published_is_not_written_again(published: int) -> None:
    """A published answer is not written again, as its slot may hold a new request by now."""
    left = Left()
    left.take(0, 0, left.slot(1), left.slot(2), answers=(left.answer(0, ANSWER_OKAY), left.answer(1, ANSWER_OKAY)))
    left.front.index[RSP_PROD] = published
    slots = [bytes(left.front.pages[at : at + X86_64.slot_size]) for at in left.back.places[:2]]
    recover(left.back, left.journal)
    after = [bytes(left.front.pages[at : at + X86_64.slot_size]) for at in left.back.places[:2]]

    assert [place < published for place in range(2)] == [one == two for one, two in zip(slots, after, strict=True)]
    assert 2 == left.front.index[RSP_PROD] == left.journal.words[1]
