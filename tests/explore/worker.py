"""A real `Queue` on a real ring and journal, which can be put into a given state and moved by one step of an engine.

Must not decide which step comes next, nor do any part of a step itself.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.explore.guest import SECTORS, Guest, Violation, status_of
from tests.explore.memory import RING, Pages, Words
from xenbackend import journal
from xenbackend.blkif.abi import BLKIF_RSP_OKAY, REQ_PROD, RING_HEADER, RSP_PROD, X86_64
from xenbackend.blkif.request import Decoder, RingRequest
from xenbackend.blkif.ring import BackRing
from xenbackend.units import PAGE
from xenbackend.worker.queue import Queue

Mind = tuple[Any, ...]  # what a worker knows, and its successor does not
Step = tuple[Any, ...]  # ("take", limit), ("answer", entries in order), ("go on",)


class Memory(NamedTuple):
    """All memory that outlives a worker."""

    req_prod: int
    rsp_prod: int
    slots: bytes
    words: tuple[int, ...]
    blocks: tuple[int, ...]
    answers: tuple[int, ...]
    copies: bytes


class Peer:
    """The other end of the event channel: events are not explored."""

    def notify(self) -> None:
        """Nothing."""

    def rearm(self) -> None:
        """Nothing."""

    def halted(self, why: str) -> None:
        """Nothing."""


class Worker:
    """One ring of `entries` slots, whose indices begin at `start`, with its guest and its worker.

    done    a bit per request that the disk has done
    before  is called before each access with what it is
    """

    def __init__(self, entries: int, requests: int, start: int, before: Callable[[int], None]) -> None:
        self.entries = entries
        self.page = memoryview(mmap.mmap(-1, PAGE))
        self.guest = Guest(self.page, entries, requests, start)
        self.guest.check_answer = self._check_answer
        self.done = 0
        self.reads: tuple[int, ...] = ()
        self._before = before
        self._raw_index = self.page.cast("I")
        self._index = Words(self._raw_index, before, RING, self._note_read)
        self._pages = Pages(self.page, before)
        self._write_response = self._pages.writer(X86_64, self._check_slot)
        self._slots = self.page[RING_HEADER : RING_HEADER + entries * X86_64.slot_size]
        memory = memoryview(mmap.mmap(-1, journal.SIZE))
        self._arrays = [[0] * 3, [0] * entries, [0] * entries * entries]
        self._journal = journal.RingJournal(memory, 0, X86_64.slot_size)
        self._journal.words, self._journal.blocks, self._journal.answers = (
            Words(raw, before, 0, self._note_read) for raw in self._arrays
        )
        self._copies = self._journal._slots[: entries * entries * X86_64.slot_size]
        self._decoder = Decoder(
            X86_64, requests * SECTORS, read_only=False, can_flush=True, can_discard=True, max_segments=11
        )
        self.queue: Queue

    def start(self) -> tuple[Memory, Mind]:
        """Begin with a new ring."""
        self._open()
        self._journal.begin(self.entries, self.queue.ring.consumed)
        return self.memory(), self.mind()

    def memory(self) -> Memory:
        """Return the memory's content."""
        words, blocks, answers = self._arrays
        index = self._raw_index
        return Memory(
            index[REQ_PROD],
            index[RSP_PROD],
            bytes(self._slots),
            tuple(words),
            tuple(blocks),
            tuple(answers),
            bytes(self._copies),
        )

    def load(self, memory: Memory) -> None:
        """Restore the memory's content."""
        self._raw_index[REQ_PROD], self._raw_index[RSP_PROD] = memory.req_prod, memory.rsp_prod
        self._slots[:] = memory.slots
        for raw, values in zip(self._arrays, (memory.words, memory.blocks, memory.answers), strict=True):
            raw[:] = values
        self._copies[:] = memory.copies

    def mind(self) -> Mind:
        """Return what the worker knows."""
        queue, ring = self.queue, self.queue.ring
        blocks = [
            (len(block.taken), block.lent is not None, block.live, block.plain) if block.live else None
            for block in queue._blocks
        ]
        return ring.consumed, ring.answered, queue.in_flight, tuple(each.index for each in queue._free), tuple(blocks)

    def think(self, mind: Mind) -> None:
        """Become a worker that knows this; memory must be as it was then."""
        self._open()
        queue = self.queue
        queue.ring.consumed, queue.ring.answered, queue.in_flight, free, blocks = mind
        for known in blocks:
            block = queue._make_block()
            if known is not None:
                count, is_lent, block.live, plain = known
                queue._equip(block, count, is_bound=False)
                block.taken = block.records[:count]
                queue._decode(block.slots[: count * queue._slot_size], block.taken)
                block.plain = plain
                block.lent = [record.request for record in block.taken] if is_lent else None
        queue._free = [queue._blocks[index] for index in free]

    def in_flight(self) -> list[int]:
        """Return the entries that the disk is working on."""
        answers = self._arrays[2]
        return [
            record.entry
            for block in self.queue._blocks
            if block.live
            for record in block.taken
            if not answers[record.entry]
        ]

    def whole_batches(self) -> list[tuple[int, ...]]:
        """Return the batches that the disk may return as they were lent."""
        lent = [tuple(each.tag.entry for each in block.lent) for block in self.queue._blocks if block.lent]
        return [batch for batch in lent if not any(self._arrays[2][entry] for entry in batch)]

    def do(self, step: Step) -> None:
        """Do one step. Raises: Violation, or what the code raises."""
        self.reads = ()
        if step[0] == "go on":
            self._open()
            for record in self.queue.go_on():
                self._number(record)
        elif step[0] == "take":
            block = self.queue.take(step[1])
            if block is not None:  # as the engine does
                for record in block.taken:
                    self._number(record)
                if block.plain:
                    block.lent = [record.request for record in block.taken]
        else:
            self.queue.answer([self._execute(entry) for entry in step[1]])

    def _open(self) -> None:
        ring = BackRing(self.page, X86_64, self.entries, lambda: None)
        ring._index, ring.pages, ring.write_response = self._index, self._pages, self._write_response
        self.queue = Queue(ring, self._journal, self._decoder, Peer())

    def _execute(self, entry: int) -> Any:
        """Let the disk do a request, and return it."""
        record = self.queue._blocks[entry // self.entries].records[entry % self.entries]
        number = self._number(record)
        self.done |= 1 << number
        record.request.status = 0 if status_of(number) == BLKIF_RSP_OKAY else errno.EIO
        return record.request

    def _number(self, record: RingRequest) -> int:
        """Return a request's number. Raises: Violation if it is not a request, or not one that waits for an answer."""
        number = record.first_sector // SECTORS
        if record.refused is not None or record.guest_id >= self.entries:
            raise Violation("something was taken that is no request")
        if self.guest.state.waiting[record.guest_id] != number or number in self.guest.published():
            raise Violation("a request was taken again that had been answered")
        return number

    def _note_read(self, value: int) -> None:
        self.reads += (value,)

    def _check_slot(self, at: int) -> None:
        """Before a response is written: check that its slot holds no request that nobody has taken."""
        slot = (at - RING_HEADER) // X86_64.slot_size
        last = self.guest.ring.produced - 1
        newest = last - (last - slot) % self.entries
        blocks = [(word >> 8) + (word & 0xFF) for word in self._arrays[1] if word & 0xFF]
        if newest >= max([self._arrays[0][journal.REQ_CONS], *blocks]):
            raise Violation("a request was overwritten that nobody had taken")

    def _check_answer(self, number: int) -> None:
        if not self.done >> number & 1:
            raise Violation("answered before it was done")
