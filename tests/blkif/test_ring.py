"""Tests of `xenbackend.blkif.ring`: the frontend's end against the backend's, and the invariants R1 to R10 by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from xenbackend.blkif.abi import (
    LAYOUTS,
    NATIVE,
    REQ_EVENT,
    REQ_PROD,
    RING_HEADER,
    RSP_EVENT,
    RSP_PROD,
    X86_32,
    X86_64,
    Layout,
    ring_entries,
)
from xenbackend.blkif.request import encode_direct
from xenbackend.blkif.ring import BackRing, FrontRing, RingOverflow

MASK = 0xFFFF_FFFF
STARTS = (0, 2**32 - 5)
SIZES = (1, 2, 32, 512)  # slots; one page has 32, and 512 is the largest ring
both_starts = pytest.mark.parametrize("start", STARTS)


def no_fence() -> None:
    """Do nothing: one thread needs no fence."""


@dataclass
class Ends:
    """Both ends of one ring; the functions `at_...` run inside each fence of that end, as on another processor."""

    pages: memoryview
    size: int
    layout: Layout
    at_fence: Callable[[], None] = no_fence
    at_front_fence: Callable[[], None] = no_fence

    def __post_init__(self) -> None:
        self.front = FrontRing(self.pages, self.layout, self.size, self.fence_front)

    def begin(self, start: int) -> None:
        """Set the index at which both ends begin."""
        self.front.start_at(start)
        self.back = BackRing(self.pages, self.layout, self.size, self.fence_back)

    def fence_front(self) -> None:
        """Run what is to happen inside a fence of the frontend."""
        self.at_front_fence()

    def fence_back(self) -> None:
        """Run what is to happen inside a fence of the backend."""
        self.at_fence()

    def ask(self, count: int) -> bool:
        """Put and push `count` requests with their numbers as ids; return whether the backend must be notified."""
        for _ in range(count):
            self.front.put(encode_direct(self.front.layout, 0, self.front.produced & MASK, 0, [(1, 0, 7)]))
        return self.front.push()

    def take(self, count: int) -> list[int]:
        """Take `count` requests, around the end of the ring if necessary, and return their ids."""
        ids = []
        while count:
            some = min(count, self.back.until_wrap())
            copy = memoryview(bytearray(some * self.back.layout.slot_size))
            self.back.take(copy, some)
            ids += [values[3] for values in self.back.layout.one.iter_unpack(copy)]
            count -= some
        return ids

    def answer(self, ids: list[int]) -> bool:
        """Answer and publish; return whether the frontend must be notified."""
        for place, guest_id in enumerate(ids, self.back.answered):
            self.back.put_response(place, guest_id, 0, 0)
        return self.back.publish(self.back.answered + len(ids))

    def collect(self) -> list[int]:
        """Return the ids of all responses that wait."""
        return [self.front.take()[0] for _ in range(self.front.waiting())]


def make_ends(size: int = 32, start: int = 0, layout: Layout = NATIVE) -> Ends:
    """Return a fresh ring of `size` slots that begins at an index."""
    pages = memoryview(bytearray(RING_HEADER + size * layout.slot_size))
    ends = Ends(pages, size, layout)
    ends.begin(start)
    return ends


@dataclass
class Trace:
    """Replaces a ring's view of the shared indices and records each access."""

    index: memoryview
    log: list[str] = field(default_factory=list)
    NAMES: ClassVar = {REQ_PROD: "req_prod", REQ_EVENT: "req_event", RSP_PROD: "rsp_prod", RSP_EVENT: "rsp_event"}

    def __getitem__(self, place: int) -> int:
        self.log.append(f"load {self.NAMES[place]}")
        return self.index[place]

    def __setitem__(self, place: int, value: int) -> None:
        self.log.append(f"store {self.NAMES[place]}")
        self.index[place] = value

    def fence(self) -> None:
        """Record that the ring asked for a fence."""
        self.log.append("fence")


def traced(ends: Ends) -> list[str]:
    """Return the list in which the backend's accesses to the indices are recorded from now on."""
    trace = Trace(ends.back._index)
    ends.back._index = trace
    ends.at_fence = trace.fence
    return trace.log


@both_starts
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_r1_indices_run_freely(layout: Layout, size: int, start: int) -> None:
    """R1: three rings full of requests come through in order, past 2**32 too, and the indices wrap as 32-bit words."""
    ends = make_ends(size, start, layout)
    for turn in range(3):
        expected = [(start + turn * size + number) & MASK for number in range(size)]
        ends.ask(size)

        assert expected == ends.take(ends.back.available())
        ends.answer(expected)
        assert expected == ends.collect()
    last = (start + 3 * size) & MASK
    assert (last, last) == (ends.front.index[REQ_PROD], ends.front.index[RSP_PROD])


@both_starts
def test_r1_slot_is_the_index_modulo_size(start: int) -> None:
    """R1: request n lies in slot n & (size - 1), and so does the response that is written to place n."""
    ends = make_ends(32, start)
    slot = RING_HEADER + (start & 31) * NATIVE.slot_size
    ends.ask(1)

    assert start & MASK == NATIVE.one.unpack_from(ends.pages, slot)[3]
    ends.take(1)
    ends.back.put_response(ends.back.answered, 0x77, 1, -1)
    assert (0x77, 1, -1) == NATIVE.response.unpack_from(ends.pages, slot)


def test_r2_the_producer_index_is_loaded_once_a_look() -> None:
    """R2, R10: a look loads the frontend's producer index exactly once; taking slots does not access the indices."""
    ends = make_ends()
    ends.ask(3)
    log = traced(ends)

    assert 3 == ends.back.available()
    ends.take(3)
    assert ["load req_prod"] == log


@both_starts
@pytest.mark.parametrize("size", SIZES)
def test_r3_more_than_the_ring_holds_is_an_overflow(size: int, start: int) -> None:
    """R3: as many requests as slots are free may be announced; a larger number, or a step back, is an overflow."""
    for taken in {0, 1, size}:
        ends = make_ends(size, start)
        ends.ask(taken)
        ends.take(taken)
        free = size - taken
        for claim in (0, free):
            ends.front.index[REQ_PROD] = (start + taken + claim) & MASK
            assert claim == ends.back.available()
        for claim in (free + 1, size + 1, 2**31, 2**32 - 1):
            ends.front.index[REQ_PROD] = (start + taken + claim) & MASK
            if claim > free:
                with pytest.raises(RingOverflow, match=f"announced {claim} requests, but only {free} slots are free"):
                    ends.back.available()
                with pytest.raises(RingOverflow):
                    ends.back.final_check()


def test_r3_answers_make_room_again() -> None:
    """R3: a slot is free again once its response has been published, and not before."""
    ends = make_ends(2)
    ends.ask(2)
    ids = ends.take(2)
    ends.front.index[REQ_PROD] = 3
    with pytest.raises(RingOverflow):
        ends.back.available()
    ends.answer(ids[:1])

    assert 1 == ends.back.available()


def test_r4_the_copy_is_not_the_ring() -> None:
    """R4: what the frontend writes to a slot after it was copied does not change the copy."""
    ends = make_ends()
    ends.ask(1)
    copy = memoryview(bytearray(NATIVE.slot_size))
    ends.back.take(copy, 1)
    before = bytes(copy)
    ends.pages[RING_HEADER:] = b"\xff" * (len(ends.pages) - RING_HEADER)

    assert before == bytes(copy)


@both_starts
def test_r4_neighbours_are_taken_up_to_the_end(start: int) -> None:
    """R4: adjacent slots are counted up to the end of the ring, where the first one follows."""
    ends = make_ends(8, start)
    found = []
    for _ in range(8):
        found.append(ends.back.until_wrap())
        ends.ask(1)
        ends.answer(ends.take(1))
        ends.collect()

    assert [8 - ((start + step) & 7) for step in range(8)] == found


@both_starts
def test_r5_responses_are_hidden_until_they_are_published(start: int) -> None:
    """R5: the response is complete in its slot before the producer index that shows it is moved."""
    ends = make_ends(32, start)
    ends.ask(2)
    ids = ends.take(2)
    seen = []
    for place, guest_id in enumerate(ids, ends.back.answered):
        ends.back.put_response(place, guest_id, 0, 0)
        seen.append(ends.front.waiting())
    ends.back.publish(ends.back.answered + 2)

    assert [0, 0] == seen
    assert ids == ends.collect()


def test_r5_padding_of_a_response_is_zero() -> None:
    """Nothing of the request, or of our memory, is left in the padding of a response."""
    for layout in LAYOUTS.values():
        ends = make_ends(1, 0, layout)
        ends.pages[RING_HEADER:] = b"\xff" * layout.slot_size
        ends.back.put_response(0, 0, 0, 0)

        assert bytes(layout.response.size) == bytes(ends.pages[RING_HEADER : RING_HEADER + layout.response.size])


@both_starts
@pytest.mark.parametrize("size", [8, 512])
def test_r6_an_event_is_due_when_the_index_passes_it(size: int, start: int) -> None:
    """R6: a response at the event index makes a notification due; one before it or long after it does not."""
    for event in range(-3, 8):
        ends = make_ends(size, start)
        ends.ask(5)
        ids = ends.take(5)
        ends.answer(ids[:2])
        ends.front.index[RSP_EVENT] = (start + event) & MASK  # responses 3 to 5 are published now

        assert (event in {3, 4, 5}) == ends.answer(ids[2:])


@both_starts
def test_r6_the_event_index_is_loaded_after_the_fence(start: int) -> None:
    """R6: publishing stores the index, fences, and only then loads the event index, so that a late change is seen."""
    ends = make_ends(32, start)
    ends.ask(1)
    ids = ends.take(1)
    ends.front.index[RSP_EVENT] = start & MASK
    seen = []

    def wish() -> None:
        seen.append(ends.front.waiting())
        ends.front.index[RSP_EVENT] = (start + 1) & MASK

    ends.at_fence = wish

    assert ends.answer(ids)
    assert [1] == seen


@both_starts
def test_r7_the_last_look_is_after_the_fence(start: int) -> None:
    """R7: before sleeping the event index is stored, then comes the fence, then one more look at the producer index."""
    ends = make_ends(32, start)
    wanted = []
    ends.at_fence = lambda: wanted.append(ends.ask(1))

    assert 1 == ends.back.final_check()
    assert [True] == wanted


def test_r6_r7_accesses_in_their_order() -> None:
    """R6, R7, R10: publishing and the last look touch each index once, with the fence between store and load."""
    ends = make_ends()
    ends.ask(1)
    ids = ends.take(1)
    log = traced(ends)
    ends.answer(ids)
    ends.back.final_check()

    assert ["store rsp_prod", "fence", "load rsp_event", "store req_event", "fence", "load req_prod"] == log


@both_starts
def test_r9_what_was_published_is_never_read_back(start: int) -> None:
    """R9: the frontend may overwrite our producer index; the backend continues from its own count."""
    ends = make_ends(32, start)
    ends.ask(3)
    ids = ends.take(3)
    ends.answer(ids[:1])
    ends.front.index[RSP_PROD] = 12345
    ends.answer(ids[1:])

    assert (start + 3) & MASK == ends.front.index[RSP_PROD]
    assert ends.back.answered <= ends.back.consumed


def test_r10_indices_are_aligned_words() -> None:
    """R10: both ends access the indices as native 32-bit words at multiples of four bytes."""
    ends = make_ends()
    for index in (ends.back._index, ends.front.index):
        assert ("I", 4) == (index.format, index.itemsize)
    ends.front.index[RSP_EVENT] = 0x01020304

    assert (0x01020304).to_bytes(4, "little") == bytes(ends.pages[4 * RSP_EVENT : 4 * RSP_EVENT + 4])


@both_starts
def test_a_new_backend_goes_on_where_the_ring_stands(start: int) -> None:
    """A backend that starts on a ring in use takes the requests after the last published response."""
    ends = make_ends(32, start)
    ends.ask(3)
    ends.answer(ends.take(2))
    again = BackRing(ends.pages, NATIVE, 32, no_fence)

    assert 1 == again.available()
    assert (start + 2) & MASK == again.answered & MASK == again.consumed & MASK


@both_starts
def test_has_moved_is_true_whenever_there_is_more(start: int) -> None:
    """A cheap look tells whether the frontend's index differs from what was taken, in either direction."""
    ends = make_ends(32, start)
    before = ends.back.has_moved()
    ends.ask(2)
    asked = ends.back.has_moved()
    ends.take(2)
    taken = ends.back.has_moved()
    ends.front.index[REQ_PROD] = (start - 1) & MASK

    assert [False, True, False, True] == [before, asked, taken, ends.back.has_moved()]


def test_a_new_ring_is_as_the_header_says() -> None:
    """SHARED_RING_INIT: both producer indices are 0 and both event indices 1."""
    ends = make_ends(2)
    FrontRing(ends.pages, NATIVE, 2, no_fence)

    assert [0, 1, 0, 1] == ends.front.index[:4].tolist()


def test_frontend_counts_its_free_slots() -> None:
    """A slot is in use from when a request is put until its response was taken."""
    ends = make_ends(4)
    found = [ends.front.free()]
    ends.ask(3)
    found.append(ends.front.free())
    ends.answer(ends.take(2))
    found.append(ends.front.free())
    ends.collect()
    found.append(ends.front.free())

    assert [4, 1, 1, 3] == found


def test_ends_let_go_of_the_pages() -> None:
    """After both ends have released their views the memory can be unmapped."""
    memory = bytearray(4096)
    pages = memoryview(memory)
    front = FrontRing(pages, NATIVE, 32, no_fence)
    back = BackRing(pages, NATIVE, 32, no_fence)
    front.release()
    back.release()
    pages.release()
    memory.append(0)  # fails while a view exists

    assert 4097 == len(memory)


def test_ring_sizes_are_the_largest_that_fit() -> None:
    """Every size of ring fits its pages, and twice as many slots would not."""
    for layout in (X86_64, X86_32):
        for order in range(5):
            slots = ring_entries(layout, order)
            assert RING_HEADER + slots * layout.slot_size <= 4096 << order < RING_HEADER + 2 * slots * layout.slot_size


class Party:
    """One side of the model: it sleeps only after a last look, and wakes only by a notification."""

    def __init__(self, look: Callable[[], int], last_look: Callable[[], int], work: Callable[[int], None]) -> None:
        self.look, self.last_look, self.work = look, last_look, work
        self.asleep = False
        self.is_notified = False

    def sleeps(self) -> bool:
        """Return whether nothing but a notification would make this party look again."""
        return self.asleep and not self.is_notified

    def step(self) -> None:
        """Do some of the waiting work, or go to sleep."""
        if self.sleeps():
            return
        self.asleep = self.is_notified = False
        waiting = self.look() or self.last_look()
        if waiting:
            self.work(waiting)
        else:
            self.asleep = True


class Model:
    """Two parties that work on the ring in any order; inside a fence the other one may take a step."""

    def __init__(self, chance: random.Random, ends: Ends, total: int) -> None:
        self.chance, self.ends, self.left = chance, ends, total
        self.held: list[int] = []
        self.collected: list[int] = []
        self.is_inside = False
        self.backend = Party(ends.back.available, ends.back.final_check, self.take)
        self.frontend = Party(ends.front.waiting, ends.front.final_check, self.collect)
        ends.at_fence = lambda: self.interrupt([self.ask, self.frontend.step])
        ends.at_front_fence = lambda: self.interrupt([self.answer, self.backend.step])

    def interrupt(self, steps: list[Callable[[], None]]) -> None:
        """Let the other party take a step, but not inside a fence of such a step."""
        if not self.is_inside and self.chance.random() < 0.5:
            self.is_inside = True
            self.chance.choice(steps)()
            self.is_inside = False

    def step(self) -> None:
        """Let one party take a step, and assert that no party with work sleeps (R6, R7)."""
        self.chance.choice([self.ask, self.answer, self.backend.step, self.frontend.step])()

        assert not (self.backend.sleeps() and self.ends.back.available())
        assert not (self.frontend.sleeps() and self.ends.front.waiting())
        assert self.ends.back.answered + len(self.held) == self.ends.back.consumed

    def take(self, waiting: int) -> None:
        """Take some requests."""
        self.held += self.ends.take(self.chance.randint(1, waiting))

    def collect(self, waiting: int) -> None:
        """Collect some responses."""
        self.collected += [self.ends.front.take()[0] for _ in range(self.chance.randint(1, waiting))]

    def ask(self) -> None:
        """Put as many requests as there is room and need for, or fewer."""
        count = self.chance.randint(0, min(self.left, self.ends.front.free()))
        self.left -= count
        if self.ends.ask(count):
            self.backend.is_notified = True

    def answer(self) -> None:
        """Answer some of what was taken, in any order."""
        self.chance.shuffle(self.held)
        some = [self.held.pop() for _ in range(self.chance.randint(0, len(self.held)))]
        if self.ends.answer(some):
            self.frontend.is_notified = True


@both_starts
@pytest.mark.parametrize("size", SIZES)
def test_no_wake_up_is_lost(size: int, start: int) -> None:
    """R6 to R9: however the ends' steps interleave, even inside fences, neither sleeps while it has work.

    Each request is answered exactly once, in any order within what was taken.
    """
    for seed in range(40):
        total = min(4 * size, 100) + 3
        model = Model(random.Random(f"{size} {start} {seed}"), make_ends(size, start), total)
        for _ in range(100 * total):
            model.step()
            if len(model.collected) == total:
                break

        assert sorted((start + number) & MASK for number in range(total)) == sorted(model.collected), f"seed {seed}"


@pytest.mark.parametrize("strong", [True, False])
def test_weak_machines_get_fences_of_their_own(*, strong: bool) -> None:
    """R2, R5: on weakly ordered machines a fence follows the load of their index and precedes the store of ours.

    On x86 no fence is needed there.
    """
    fences: list[str] = []
    pages = memoryview(bytearray(4096))
    ring = BackRing(pages, NATIVE, 32, lambda: fences.append("fence"), is_strongly_ordered=strong)
    ring.available()
    after_load = len(fences)
    ring.publish(0)

    assert (0, 1) == (after_load, len(fences)) if strong else (1, 3) == (after_load, len(fences))
