"""Verified load for as many requests as possible: full rings of whole pages, made and judged by the ring.

Must not be the only load of a disk: parts of pages, other operations and rings that are not full are `workload.Load`'s.

A round fills each ring with reads and writes of distinct pages, in a random order with random ids, and ends when all of
them are answered. Every read is compared with what the model says may be there, and every answer with the only right
one, padding included; no two writes have the same data. Most of that is one call for a whole ring: a request takes a
thirtieth of the time that it takes `Load`. A loop looks at each answer of a ring in which something differs. Some
rounds are watched: each answer is judged as soon as it is there, because its bytes, its data and the end of its
mappings must not come later.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from random import Random
from struct import Struct
from typing import Any

from xenbackend.blkif.abi import (
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_OKAY,
    LAST_SECTOR_OF_PAGE,
    RING_HEADER,
    Layout,
)
from xenbackend.blkif.request import encode_direct
from xenbackend.rig.frontend import Frontend
from xenbackend.rig.guest_ring import PER_PAGE, BackendMisbehaved, GuestRing
from xenbackend.rig.pattern import DiskModel, Step, make
from xenbackend.rig.table import GTF_READONLY
from xenbackend.units import PAGE, SECTOR

_PATTERNS = 16  # ways to fill a ring; each round takes one at random
_ROUNDS = 256  # until the pages get another order
_WATCHED = 16  # one round of so many is watched
_UNTOUCHED = b"\xa5"  # fills pages that are to be read into, so that bytes that the backend does not write are noticed


class KnownDisk(DiskModel):
    """A model that has the likely contents as bytes as well: where they are right, one comparison is enough.

    The likely contents of a sector are always among the possible ones: what was written there last or, where a discard
    or a failed write has left a choice, what was read there last. Other data are compared with all that is possible.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._likely = bytearray(make(self.seed, 0, [self.first] * self.sectors))
        self._first = make(self.seed, 0, [1] * self.sectors)  # generation 1 of every sector

    def step(self, operation: int, sector: int, count: int) -> Step:
        """Return the given step and count it as in flight. The caller has to avoid overlaps."""
        if operation != BLKIF_OP_WRITE:
            return super().step(operation, sector, count)
        self._writing[sector : sector + count] = b"\1" * count
        generation, data = self.next_write([sector], count)
        return Step(operation, sector, count, bytes(data), generation)

    def finish(self, step: Step, status: int, data: bytes = b"") -> None:
        """Note the result of a step: its status (BLKIF_RSP_*), and the data of a read. Raises: WrongData."""
        super().finish(step, status, data)
        if step.operation == BLKIF_OP_WRITE and status == BLKIF_RSP_OKAY:
            self._likely[step.sector * SECTOR : (step.sector + step.count) * SECTOR] = step.data

    def check(self, sector: int, data: bytes) -> None:
        """Compare bytes read from `sector` on with the possible contents. Raises: WrongData."""
        start, end = sector * SECTOR, sector * SECTOR + len(data)
        if self._likely[start:end] == data:
            self.verified += len(data) // SECTOR
        else:
            super().check(sector, data)
            self._likely[start:end] = data

    def next_write(self, sectors: Sequence[int], count: int) -> tuple[int, bytearray]:
        """Return a new generation, and its bytes for `count` sectors from each of `sectors` on."""
        self._generation += 1
        first, size = self._first, count * SECTOR
        data = bytearray().join([first[sector * SECTOR : sector * SECTOR + size] for sector in sectors])
        words = memoryview(data).cast("Q")
        words[3::4] = memoryview(array("Q", [self._generation]) * (len(words) // 4))
        return self._generation, data

    def wrote(self, sectors: Sequence[int], count: int, generation: int, data: bytes | bytearray) -> None:
        """Note that `count` sectors from each of `sectors` on were written, with what `next_write` has returned."""
        likely, view, size = self._likely, memoryview(data), count * SECTOR
        possible = [(generation,)] * count
        place = 0
        for sector in sectors:
            self._possible[sector : sector + count] = possible
            likely[sector * SECTOR : sector * SECTOR + size] = view[place : place + size]
            place += size

    def check_each(self, sectors: Sequence[int], count: int, data: memoryview) -> None:
        """Compare bytes that were read, `count` sectors from each of `sectors` on. Raises: WrongData."""
        likely, size = self._likely, count * SECTOR
        # `bytearray ==` compares memory at once; `memoryview ==` would look at each byte
        if bytearray().join([likely[sector * SECTOR : sector * SECTOR + size] for sector in sectors]) == data:
            self.verified += count * len(sectors)
            return
        for number, sector in enumerate(sectors):
            self.check(sector, bytes(data[number * size : (number + 1) * size]))


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One way to fill a ring. Its requests have numbers, in the order of their pages; the first ones are writes.

    slots       the ring's bytes, all requests for sector 0
    by_slot     takes one value for each request, and returns them in the order of the slots
    operations  the operation of each request, and its number, by its id
    answers     the bytes of every answer
    grants      the entries of the grant table, of all pages
    """

    writes: int
    slots: bytes
    by_slot: Callable[[Sequence[int]], tuple[int, ...]]
    operations: dict[int, tuple[int, int]]
    answers: frozenset[tuple[bytes]]
    grants: memoryview


class _FullRing:
    """One ring, with pages for the request in each of its slots."""

    def __init__(self, ring: GuestRing, model: KnownDisk, pages: int, most_writes: float) -> None:
        self.size = ring.ring.size
        self._unanswered: dict[int, tuple[int, int]] | None = None  # the pattern's operations, in a watched round
        self._ring, self._model, self._random = ring, model, model.random
        self._sectors_of_each = pages * PER_PAGE
        guest, layout, total = ring.guest, ring.layout, self.size * pages
        frames = guest.allocate(total)
        grefs = [guest.grant(frame) for frame in frames]
        if any(list(range(each[0], each[0] + total)) != each for each in (frames, grefs)):
            raise ValueError("the guest's free pages and grants are not adjacent: fill rings before all other requests")
        self._memory = guest.page(frames[0], total)
        self._grants = guest.table.entries[grefs[0] : grefs[0] + total]
        self._no_grants = memoryview(array("Q", [0]) * total)
        self._untouched = _UNTOUCHED * (total * PAGE)
        self._slots = ring.ring.pages[RING_HEADER : RING_HEADER + self.size * layout.slot_size]
        sector_at = layout.segments_at - 8  # bytes into a slot
        self._sectors = self._slots.cast("I")[sector_at // 4 :: layout.slot_size // 4]
        answer = layout.response.size
        self._answers = Struct(f"{answer}s{layout.slot_size - answer}x").iter_unpack
        grants, most = self._grants.tolist(), max(1, int((self.size - 1) * most_writes))
        self._patterns = [
            _pattern(layout, grefs, grants, pages, model.random, model.random.randint(1, most))
            for _ in range(_PATTERNS)
        ]
        if not ring.persistent:
            self._grants[:] = self._no_grants

    def fill(self, sectors: list[int], *, is_watched: bool) -> None:
        """Ask for what begins at these sectors, one for each slot; `is_watched`: judge each answer when it is taken."""
        self._pattern = pattern = self._random.choice(self._patterns)
        self._unanswered = dict(pattern.operations) if is_watched else None
        self._of_writes, self._of_reads = sectors[: pattern.writes], sectors[pattern.writes :]
        self._generation, self._data = self._model.next_write(self._of_writes, self._sectors_of_each)
        self._memory[: len(self._data)] = self._data
        self._memory[len(self._data) :] = self._untouched[len(self._data) :]
        if not self._ring.persistent:
            self._grants[:] = pattern.grants
        self._slots[:] = pattern.slots
        self._sectors[:] = memoryview(array("I", pattern.by_slot(sectors)))
        self._ring.ring.produced += self.size
        self._ring.push()

    def take(self) -> int:
        """Return how many answers have come; unless they are watched, all of a ring are judged with the last ones.

        Raises: WrongData, BackendMisbehaved.
        """
        front, before = self._ring.ring, self._ring.ring.consumed
        self._ring.port.clear()
        while count := front.waiting() or front.final_check():
            if count > front.pushed - front.consumed:
                raise BackendMisbehaved(f"{count} responses to {front.pushed - front.consumed} requests")
            if self._unanswered is not None:
                self._judge_each(self._unanswered, front.consumed, count)
            front.consumed += count
        if self._unanswered is None and before < front.consumed == front.pushed:
            self._judge()
        return front.consumed - before

    def _judge(self) -> None:
        """Judge a ring whose requests are all answered. Raises: WrongData, BackendMisbehaved."""
        pattern, model = self._pattern, self._model
        if frozenset(self._answers(bytes(self._slots))) != pattern.answers:
            self._judge_each(dict(pattern.operations), 0, self.size)
            return
        if not self._ring.persistent:
            if self._grants != pattern.grants:
                raise BackendMisbehaved("a grant is still mapped, though all requests were answered")
            self._grants[:] = self._no_grants
        model.check_each(self._of_reads, self._sectors_of_each, self._memory[len(self._data) :])
        model.wrote(self._of_writes, self._sectors_of_each, self._generation, self._data)

    def _judge_each(self, unanswered: dict[int, tuple[int, int]], first: int, count: int) -> None:
        """Judge answer by answer, `count` of them from number `first` on, each with its data and grants.

        `unanswered` are those of the pattern's `operations` that no earlier answer is for; the answered ones leave it.

        Raises: WrongData, BackendMisbehaved.
        """
        layout = self._ring.layout
        for place in range(first, first + count):
            start = place % self.size * layout.slot_size
            raw = bytes(self._slots[start : start + layout.response.size])
            guest_id, operation, status = layout.response.unpack(raw)
            if guest_id not in unanswered:
                raise BackendMisbehaved(f"a response to request {guest_id}, which is not in flight")
            asked, number = unanswered.pop(guest_id)
            if operation != asked:
                raise BackendMisbehaved(f"operation {operation} in the response to operation {asked}")
            if raw != layout.response.pack(guest_id, operation, status):
                raise BackendMisbehaved(f"padding that is not zero in the response {raw.hex()}")
            self._take_back(number)
            self._finish(number, status)

    def _take_back(self, number: int) -> None:
        """Revoke the grants of one request. Raises: BackendMisbehaved."""
        if self._ring.persistent:
            return
        pages = self._sectors_of_each // PER_PAGE
        # one by one: to compare slices takes three times as long for one page
        for page in range(number * pages, (number + 1) * pages):
            if self._grants[page] != self._pattern.grants[page]:
                raise BackendMisbehaved("a grant is still mapped, though its request was answered")
            self._grants[page] = 0

    def _finish(self, number: int, status: int) -> None:
        """Note the result of one request. Raises: WrongData."""
        model, count, writes = self._model, self._sectors_of_each, len(self._of_writes)
        place = slice(number * count * SECTOR, (number + 1) * count * SECTOR)
        if number < writes:
            data = bytes(self._data[place])
            model.finish(Step(BLKIF_OP_WRITE, self._of_writes[number], count, data, self._generation), status)
        elif status == BLKIF_RSP_OKAY:
            model.check(self._of_reads[number - writes], bytes(self._memory[place]))
        else:
            model.failures += 1


class FullRings:
    """Rounds of full rings on one disk, while nothing else is in flight there; each may be looked at from outside.

    begun, finished, settled    as those of `workload.Load`
    """

    def __init__(
        self,
        frontend: Frontend,
        model: KnownDisk,
        patience_s: float = 10.0,
        on_answers: Callable[[Any], None] = lambda _: None,
        *,
        pages: int = 1,
        most_writes: float = 1.0,
    ) -> None:
        """Take the pages for the rings; before any other request of the guest. Raises: KernelError, ValueError.

        An answer may take `patience_s` seconds, and `on_answers` is called when some have come. Each request is for
        `pages` pages, or fewer if the disk has fewer for each slot; up to `most_writes` of those of a round are writes.
        """
        self.begun = self.finished = self.settled = 0  # requests
        self._frontend, self._patience_s, self._on_answers = frontend, patience_s, on_answers
        self._random = model.random
        self._size = sum(ring.ring.size for ring in frontend.rings)
        pages = min(pages, model.sectors // PER_PAGE // self._size)
        if not pages:
            raise ValueError(f"{model.sectors} sectors are not enough for {self._size} requests at once")
        self._rings = [_FullRing(ring, model, pages, most_writes) for ring in frontend.rings]
        self._order = [*range(0, model.sectors - pages * PER_PAGE + 1, pages * PER_PAGE)]
        self._rounds = 0

    def run(self, rounds: int) -> None:
        """Begin so many rounds, and wait for each. Raises: WrongData, BackendMisbehaved, TimeoutError."""
        for _ in range(rounds):
            self.begin()
            self.finish()

    def finish(self) -> None:
        """Wait until the round has ended. Raises: WrongData, BackendMisbehaved, TimeoutError."""
        while self.settled < self.begun:
            deadline = time.monotonic() + self._patience_s
            while not self.take():
                self._frontend._pause(deadline, "nothing in flight was answered")

    def begin(self) -> None:
        """Begin a round; the last one has ended."""
        if not self._rounds % _ROUNDS:
            self._random.shuffle(self._order)
        is_watched = not self._rounds % _WATCHED
        self._rounds += 1
        at = self._random.randrange(len(self._order) - self._size + 1)
        for ring in self._rings:
            ring.fill(self._order[at : at + ring.size], is_watched=is_watched)
            at += ring.size
        self.begun += self._size

    def take(self) -> int:
        """Take the answers that are there, without waiting; return how many. Raises: WrongData, BackendMisbehaved."""
        count = sum([ring.take() for ring in self._rings])
        if count:
            self.finished += count
            if self.finished == self.begun:
                self.settled = self.begun
            self._on_answers(self)
        return count


def _pattern(layout: Layout, grefs: list[int], grants: list[int], pages: int, random: Random, writes: int) -> _Pattern:
    """Return a random way to fill a ring with so many writes, and reads, of `pages` pages each."""
    size = len(grefs) // pages
    numbers, ids = (random.sample(range(size), size) for _ in range(2))  # by slot
    operations = {
        guest_id: (BLKIF_OP_WRITE if number < writes else BLKIF_OP_READ, number)
        for guest_id, number in zip(ids, numbers, strict=True)
    }
    segments = [(gref, 0, LAST_SECTOR_OF_PAGE) for gref in grefs]
    return _Pattern(
        writes,
        b"".join(
            encode_direct(layout, operation, guest_id, 0, segments[number * pages : (number + 1) * pages])
            for guest_id, (operation, number) in operations.items()
        ),
        itemgetter(*numbers),
        operations,
        frozenset(
            (layout.response.pack(guest_id, operation, BLKIF_RSP_OKAY),)
            for guest_id, (operation, _) in operations.items()
        ),
        memoryview(array("Q", [grant | GTF_READONLY * (page < writes * pages) for page, grant in enumerate(grants)])),
    )
