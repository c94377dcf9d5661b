"""A queue between a ring and its journal: wherever the worker dies, the journal says what remains to be done."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

import pytest

from xenbackend import journal
from xenbackend.blkif.abi import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    LAYOUTS,
    RSP_PROD,
    ring_entries,
)
from xenbackend.blkif.request import Decoder, encode_direct
from xenbackend.blkif.ring import BackRing, FrontRing, RingOverflow
from xenbackend.block.request import Request
from xenbackend.units import PAGE
from xenbackend.worker.queue import RECORDS_PER_SLOT, Queue

SECTORS = 4096
STARTS = [0, 2**32 - 5]


class Peer:
    """The other end of the event channel, which counts."""

    def __init__(self) -> None:
        self.notified = self.rearmed = 0
        self.why: list[str] = []

    def notify(self) -> None:
        """Count a notification."""
        self.notified += 1

    def rearm(self) -> None:
        """Count a request to be notified again."""
        self.rearmed += 1

    def halted(self, why: str) -> None:
        """Record why."""
        self.why.append(why)


class Desk:
    """Both ends of a ring in private memory. Each request's id is its number; `answered` has those whose responses were
    taken.
    """

    def __init__(self, protocol: str, start: int) -> None:
        self.layout = LAYOUTS[protocol]
        pages = memoryview(mmap.mmap(-1, PAGE))
        self.front = FrontRing(pages, self.layout, ring_entries(self.layout, 0), lambda: None)
        self.front.start_at(start)
        self.start = start
        self.back = BackRing(pages, self.layout, self.front.size, lambda: None)
        self.journal = journal.RingJournal(memoryview(mmap.mmap(-1, journal.SIZE)), 1, self.layout.slot_size)
        self.journal.begin(self.front.size, self.back.consumed)
        decoder = Decoder(self.layout, SECTORS, read_only=False, can_flush=True, can_discard=True, max_segments=256)
        self.peer = Peer()
        self.queue = Queue(self.back, self.journal, decoder, self.peer)
        self.answered: list[int] = []

    def push(self, *operations: int) -> None:
        """Publish requests."""
        for operation in operations:
            segments = [] if operation == BLKIF_OP_FLUSH_DISKCACHE else [(9, 0, 7)]
            self.front.put(encode_direct(self.layout, operation, self.front.produced, 8, segments))
        self.front.push()

    def take(self) -> list[Request]:
        """Take a batch, and mark it as lent together if that is allowed."""
        block = self.queue.take(99)
        assert block is not None
        requests = [record.request for record in block.taken]
        if block.plain:
            block.lent = requests[:]
        return requests

    def answer(self, requests: list[Request], *statuses: int) -> None:
        """Answer requests, with status 0 unless another is given."""
        for place, request in enumerate(requests):
            request.status = statuses[place] if place < len(statuses) else 0
        self.queue.answer(requests)

    def published(self) -> int:
        """Return the number of the next response, from the shared ring."""
        return self.front.consumed + self.front.waiting()

    def reap(self) -> list[int]:
        """Take the published responses, and return the numbers of their requests."""
        new = [self.front.take()[0] for _ in range(self.front.waiting())]
        self.answered += new
        return new

    def check(self) -> None:
        """Check that each request is exactly one of: waiting in the ring, to be answered by the journal, answered."""
        journalled = self.journal
        peeked = []
        for place in range(self.front.consumed, self.published()):
            raw = self.front.pages[(start := 64 + (place % self.front.size) * self.layout.slot_size) : start + 8]
            peeked.append(int.from_bytes(raw, "little"))
        consumed = journalled.words[journal.REQ_CONS]
        pending, places = [], []
        for index, word in enumerate(journalled.blocks[: self.front.size].tolist()):
            first, count = word >> 8, word & 0xFF
            consumed = max(consumed, first + count)
            for place in range(count):
                answer = journalled.answers[index * journal.BATCH + place]
                if answer and answer >> 2 < max(self.published(), journalled.words[journal.RSP_PROD]):
                    continue
                if answer:
                    places.append(answer >> 2)
                slot = journalled.block_slots(index)[place * self.layout.slot_size :]
                assert first + place == self.layout.one.unpack_from(slot)[3]
                pending.append(first + place)
        waiting = range(consumed, self.front.pushed)

        assert list(range(self.start, self.front.pushed)) == sorted([*self.answered, *peeked, *pending, *waiting])
        assert list(range(self.published(), self.published() + len(places))) == sorted(places)


@contextmanager
def checked_after_each_line(desk: Desk) -> Iterator[None]:
    """Check the journal after every line of the queue and the ring that runs, as a successor would read it."""

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(("worker/queue.py", "blkif/ring.py")):
            return None
        if frame.f_code.co_name in {"take", "answer", "publish", "_answer_whole", "_answer_each", "_release"}:
            desk.check()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("protocol", LAYOUTS)
def test_journal_is_right_after_every_store(protocol: str, start: int) -> None:
    """If the worker dies between any two stores of `take` and `answer`, no request is lost, repeated, or answered
    twice.
    """
    desk = Desk(protocol, start)
    random = Random(1)
    taken: list[list[Request]] = []
    for _ in range(40):
        operations = [BLKIF_OP_READ, BLKIF_OP_WRITE]
        if random.random() < 0.3:
            operations.append(BLKIF_OP_FLUSH_DISKCACHE)
        desk.push(*random.choices(operations, k=random.randint(0, desk.front.free())))
        with checked_after_each_line(desk):
            while desk.back.available():
                taken.append(desk.take())
        while taken and random.random() < 0.8:
            batch = taken.pop(random.randrange(len(taken)))
            if len(batch) > 1 and random.random() < 0.4:
                random.shuffle(batch)
                taken.append(batch[1:])
                batch = batch[:1]
            with checked_after_each_line(desk):
                desk.answer(batch, random.choice([0, 0, 5, 95]))
            desk.reap()

    assert len(desk.answered) > 100


@pytest.mark.parametrize("start", STARTS)
def test_batches_end_where_the_ring_wraps(start: int) -> None:
    """A batch has at most BATCH adjacent slots, so that one copy takes them."""
    desk = Desk("x86_64-abi", start)
    desk.push(*[BLKIF_OP_READ] * 32)
    sizes = []
    while desk.back.available():
        sizes.append(len(desk.take()))

    assert sum(sizes) == 32
    assert ([journal.BATCH, journal.BATCH] if start == 0 else [5, journal.BATCH, 32 - 5 - journal.BATCH]) == sizes


def test_answers_say_how_it_went() -> None:
    """Status 0 becomes okay, EOPNOTSUPP its own code, and any other errno an error; only successful requests are
    counted.
    """
    desk = Desk("x86_64-abi", 0)
    desk.push(BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE)
    desk.answer(desk.take(), 0, 95, 5)

    assert [(0, 0, 0), (1, 1, -2), (2, 1, -1)] == [desk.front.take()[:3] for _ in range(3)]
    assert (1, 0, 2) == (desk.queue.requests[BLKIF_OP_READ], desk.queue.requests[BLKIF_OP_WRITE], desk.queue.errors)
    assert PAGE == desk.queue.bytes[BLKIF_OP_READ]
    assert 0 == desk.queue.in_flight


def test_one_kick_for_a_batch_that_was_asked_for() -> None:
    """The frontend is notified once for a batch that contains the response it waits for, and otherwise not."""
    desk = Desk("x86_64-abi", 0)
    desk.push(*[BLKIF_OP_READ] * 8)
    first = desk.take()
    desk.answer(first[:4])
    desk.answer(first[4:])
    silent = desk.peer.notified
    desk.reap()
    desk.front.final_check()
    desk.push(BLKIF_OP_READ)
    desk.answer(desk.take())

    assert [1, 2] == [silent, desk.peer.notified]


def test_blocks_are_used_again() -> None:
    """No more blocks are used than batches were in flight at once, however many requests there are."""
    desk = Desk("x86_64-abi", 0)
    for _ in range(50):
        desk.push(BLKIF_OP_READ, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_READ)
        first = desk.take()
        desk.push(BLKIF_OP_READ)
        desk.answer(desk.take())
        desk.answer(first)
        desk.reap()

    assert 2 == sum(word != 0 for word in desk.journal.blocks)


def test_halted_queue_says_why_and_still_answers() -> None:
    """When a ring is stopped, the reason is reported, and requests that were taken before are answered."""
    desk = Desk("x86_64-abi", 0)
    desk.push(BLKIF_OP_READ)
    requests = desk.take()
    desk.front.index[0] = 2**31
    with pytest.raises(RingOverflow):
        desk.queue.take(8)
    desk.queue.halt("it is broken")
    desk.answer(requests)

    assert desk.queue.halted
    assert ["it is broken"] == desk.peer.why
    assert 1 == desk.front.index[RSP_PROD]


def test_release_lets_go_of_all_memory() -> None:
    """After `release` the queue holds no view of the ring or the journal, so that both can be unmapped."""
    desk = Desk("x86_64-abi", 0)
    desk.push(BLKIF_OP_READ)
    desk.answer(desk.take())
    desk.queue.release()

    with pytest.raises(ValueError, match="released"):
        desk.journal.words[0] = 1


def records_of(queue: Queue) -> int:
    """Return how many records a queue keeps."""
    return sum(len(block.records) for block in queue._blocks)


def test_requests_that_come_one_at_a_time_have_a_record_each() -> None:
    """R12: a batch of one request takes one record, however large batches may be."""
    desk = Desk("x86_64-abi", 0)
    taken = []
    for _ in range(desk.front.size):
        desk.push(BLKIF_OP_READ)
        taken += desk.take()

    assert desk.front.size == len(taken) == records_of(desk.queue)
    desk.answer(taken)
    assert desk.front.size == len(desk.reap())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.rows("R12")
def test_records_are_bounded_in_whatever_order_requests_are_answered(seed: int) -> None:
    """R12: even if each batch keeps one unanswered request, so that all have gaps, there are only a few records per
    slot: batches get smaller. Every request is answered once.
    """
    random = Random(seed)
    desk = Desk("x86_64-abi", 0)
    size, slow, pushed = desk.front.size, [], 0
    for _ in range(40 * size):
        if len(slow) == size:
            random.shuffle(slow)
            desk.answer(slow[: size // 2])
            slow = slow[size // 2 :]
            desk.reap()
        count = random.randint(1, size - len(slow))
        desk.push(*[BLKIF_OP_READ] * count)
        pushed += count
        while desk.back.available():
            first, *others = desk.take()
            slow.append(first)
            if others:
                desk.answer(others)
        desk.reap()
        desk.check()
        assert records_of(desk.queue) <= (RECORDS_PER_SLOT + 1) * size
    desk.answer(slow)
    desk.reap()

    assert sorted(range(pushed)) == sorted(desk.answered)


def test_a_record_at_rest_keeps_no_memory_of_the_guest() -> None:
    """R12: the views of a request, hundreds perhaps, are released when it is answered."""
    desk = Desk("x86_64-abi", 0)
    desk.push(BLKIF_OP_FLUSH_DISKCACHE)
    (request,) = desk.take()
    request.iov = tuple(memoryview(bytes(512)) for _ in range(256))
    desk.answer([request])

    assert () == request.iov
