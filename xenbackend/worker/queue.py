"""One shared ring in service: takes its slots into the journal, and writes its answers by way of the journal.

Must not know a driver or a grant, nor decide what is answered. `xenbackend.journal` says in which order to write.
"""

from __future__ import annotations

import errno
from struct import Struct
from time import monotonic_ns
from typing import Protocol

from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
)
from xenbackend.blkif.request import Decoder, RingRequest
from xenbackend.blkif.ring import BackRing
from xenbackend.block.request import Request
from xenbackend.counters import BUCKETS, OPERATIONS
from xenbackend.journal import (
    ANSWER_EOPNOTSUPP,
    ANSWER_ERROR,
    ANSWER_OKAY,
    BATCH,
    REQ_CONS,
    RSP_PROD,
    SEGMENTS,
    RingJournal,
)
from xenbackend.units import PAGE
from xenbackend.worker.recovery import recover

RECORDS_PER_SLOT = 4  # of a ring: requests answered out of order leave gaps in their batches
_UNTIMED = 7 * BATCH  # bits of a batch's first request number: if any is set, it is not timed: 7 in 8 batches
_KINDS = len(OPERATIONS) + 1  # the last one is for operations that do not exist
_KIND = [_KINDS - 1] * 256
_KIND[BLKIF_OP_READ] = 0
_KIND[BLKIF_OP_WRITE] = _KIND[BLKIF_OP_WRITE_BARRIER] = 1
_KIND[BLKIF_OP_FLUSH_DISKCACHE] = 2
_KIND[BLKIF_OP_DISCARD] = 3
_OPERATIONS = 256  # an operation is one byte from the guest
_WORDS = [Struct(f"@{count}Q") for count in range(BATCH + 1)]  # native: each word is one store
_ZEROS = [memoryview(bytes(8 * count)).cast("Q") if count else memoryview(b"") for count in range(BATCH + 1)]


class Block:
    """A block of journal entries, and the objects pooled for them; it holds one batch until all of that is answered.

    slots       the private copies of its slots
    records     of its first entries, as many as a batch has needed so far
    taken       the records of the batch
    lent        the requests of the batch, if all of them were handed to the chain together
    live        requests not answered yet
    """

    __slots__ = ("first_entry", "index", "lent", "live", "plain", "records", "slots", "started", "taken")

    def __init__(self, index: int, slots: memoryview) -> None:
        self.index = index
        self.first_entry = index * BATCH
        self.slots = slots
        self.records: list[RingRequest] = []
        self.taken: list[RingRequest] = []
        self.lent: list[Request] | None = None
        self.live = 0
        self.plain = True
        self.started = 0

    def equip(self, count: int, queue: Queue) -> None:
        """Make records until the first `count` entries have them."""
        for entry in range(self.first_entry + len(self.records), self.first_entry + count):
            record = RingRequest(entry, queue, Request())
            record.request.tag = record
            self.records.append(record)


class EventChannel(Protocol):
    """The ring's event channel, which is also told that the ring is broken."""

    def notify(self) -> None:
        """Notify the frontend."""

    def rearm(self) -> None:
        """Let the frontend notify us again: the ring is empty."""

    def halted(self, why: str) -> None:
        """Take note that the ring was stopped."""


class Queue:
    """Takes batches from one ring and answers them.

    requests, bytes   answered without an error, by BLKIF_OP_*
    in_flight         taken and not answered
    latency           of each of counters.OPERATIONS, and of all others, by buckets; `latency_ns`: their sums
    """

    def __init__(self, ring: BackRing, journal: RingJournal, decoder: Decoder, channel: EventChannel) -> None:
        """Serve `ring`; `journal` was begun at its index."""
        self.ring = ring
        self.halted = False  # the frontend broke the ring: nothing is taken any more
        self.is_idle = True  # waiting for an event, its channel armed
        self.rearm = channel.rearm
        self.in_flight = 0
        self.requests = [0] * _OPERATIONS
        self.bytes = [0] * _OPERATIONS
        self.errors = self.notifications = 0
        self.samples = self.latency_max_ns = 0
        self.latency = [[0] * BUCKETS for _ in range(_KINDS)]
        self.latency_ns = [0] * _KINDS
        self._places = ring.places * 2  # of the slots, twice: a batch of answers may wrap at the ring's end
        self._journal = journal
        self._answers = journal.answers
        self.decoder = decoder
        self._decode = decoder.decode
        self._channel = channel
        self.decode_indirect = decoder.decode_indirect
        self.segments = memoryview(bytearray(SEGMENTS))  # the private copy of one request's, until it is decoded
        self._slot_size = ring.layout.slot_size
        self._records_left = RECORDS_PER_SLOT * ring.size  # that may still be made, beyond one for each block
        self._blocks: list[Block] = []
        self._free: list[Block] = []

    def go_on(self) -> list[RingRequest]:
        """Continue where a predecessor stopped; return the requests that it had not answered, decoded, in ring order.

        Raises: RingOverflow, as `recover` does.
        """
        entries = recover(self.ring, self._journal)
        places: dict[int, list[int]] = {}
        for entry in entries:
            places.setdefault(entry // BATCH, []).append(entry % BATCH)
        for index in range(max(places, default=-1) + 1):
            block = self._make_block()
            if index in places:
                self._take_again(block, places[index])
            else:
                self._free.append(block)
        self.in_flight = len(entries)
        return [self._blocks[entry // BATCH].records[entry % BATCH] for entry in entries]

    def _take_again(self, block: Block, places: list[int]) -> None:
        """Make a block hold the unanswered requests at these places of it."""
        count = places[-1] + 1
        block.live = len(places)
        self._equip(block, count, is_bound=False)
        block.taken = block.records[:count]
        self._decode(block.slots[: count * self._slot_size], block.taken)
        block.plain = False  # so that its records are reset when it is free

    def take(self, limit: int) -> Block | None:
        """Take up to `limit` waiting requests into a block, decoded; None if none waits. Raises: RingOverflow."""
        ring = self.ring
        count = ring.available()
        if not count:
            return None
        count = min(count, limit, BATCH, ring.until_wrap())
        block = self._free.pop() if self._free else self._make_block()
        if count > len(block.records):
            count = self._equip(block, count)
        copies = block.slots[: count * self._slot_size]
        first = ring.consumed
        journal = self._journal
        journal.blocks[block.index] = 0  # what it held before must not look as if it were in flight again
        ring.take(copies, count)
        entry = block.first_entry
        self._answers[entry : entry + count] = _ZEROS[count]
        journal.blocks[block.index] = first << 8 | count
        journal.words[REQ_CONS] = first + count
        self.in_flight += count
        block.live = count
        block.started = 0 if first & _UNTIMED else monotonic_ns()
        block.taken = block.records if count == len(block.records) else block.records[:count]
        block.plain = self._decode(copies, block.taken)
        return block

    def halt(self, why: str) -> None:
        """Stop taking from this ring for good; what is in flight is still answered."""
        self.halted = True
        self._channel.halted(why)

    def has_answered(self, record: RingRequest) -> bool:
        """Return whether a record that was taken has its response."""
        return bool(self._answers[record.entry])

    def answer_whole(self, batch: list[Request]) -> bool:
        """Answer a batch that came back as it was lent and without an error; False, with nothing done, for any other.

        Nearly every request is answered here.
        """
        block = self._blocks[batch[0].tag.entry // BATCH]
        first = self.ring.answered
        if batch != block.lent or not self._answer_whole(block, batch, first):
            return False
        if block.started:
            self._sample(block, batch[0].tag.operation)
        self._publish(first + len(batch))
        self._free_block(block)
        return True

    def answer(self, batch: list[Request]) -> None:
        """Answer finished requests of this ring, in any order: `status` 0 or an errno."""
        if self.answer_whole(batch):
            return
        block = self._blocks[batch[0].tag.entry // BATCH]
        if block.started:
            self._sample(block, batch[0].tag.operation)
        first = self.ring.answered
        self._answer_each(batch, first)
        self._publish(first + len(batch))
        self._release(batch)

    def break_up(self, record: RingRequest) -> None:
        """Take note that a record's batch does not come back as one."""
        self._blocks[record.entry // BATCH].lent = None

    def put_back(self) -> None:
        """Write the requests that were not answered into the ring again, right behind the last response, in order.

        Whoever joins the ring anew begins there, without the journal. Responses may have been given out of order, so
        these slots may hold other requests, which were answered.
        """
        size = self._slot_size
        for place, (_, entry) in enumerate(self._journal.unanswered(), self.ring.answered):
            block, at = divmod(entry, BATCH)
            self.ring.put_back(place, self._journal.block_slots(block)[at * size : (at + 1) * size])

    def release(self) -> None:
        """Release the ring and the journal."""
        for block in self._blocks:
            block.slots.release()
            for record in block.records:
                record.request.iov = ()
        self.ring.release()
        self._journal.release()

    def _answer_whole(self, block: Block, batch: list[Request], place: int) -> bool:
        """Answer a block of reads and writes that came back as it was lent; False, with nothing counted, if one failed.

        This loop runs for nearly every request. The slots may be written before the answer words: nobody looks at
        them before the response producer moves.
        """
        ring = self.ring
        write, pages = ring.write_response, ring.pages
        slot = place & ring.size - 1
        writes = 0
        for request, at in zip(batch, self._places[slot : slot + len(batch)], strict=True):
            if request.status:
                return False
            record = request.tag
            operation = record.operation
            writes += operation
            write(pages, at, record.guest_id, operation, BLKIF_RSP_OKAY)
        words = range(place << 2 | ANSWER_OKAY, place + len(batch) << 2 | ANSWER_OKAY, 4)
        _WORDS[len(batch)].pack_into(self._answers, block.first_entry * 8, *words)
        requests, moved = self.requests, self.bytes
        reads = len(batch) - writes
        requests[BLKIF_OP_READ] += reads
        requests[BLKIF_OP_WRITE] += writes
        if block.plain:
            moved[BLKIF_OP_READ] += reads * PAGE
            moved[BLKIF_OP_WRITE] += writes * PAGE
        else:
            for record in block.taken:
                moved[record.operation] += record.length
        return True

    def _answer_each(self, batch: list[Request], place: int) -> None:
        for request in batch:
            record = request.tag
            word, status = ANSWER_OKAY, BLKIF_RSP_OKAY
            if request.status == 0:
                self.requests[record.operation] += 1
                self.bytes[record.operation] += record.length
            else:
                self.errors += 1
                word, status = ANSWER_ERROR, BLKIF_RSP_ERROR
                if request.status == errno.EOPNOTSUPP:
                    word, status = ANSWER_EOPNOTSUPP, BLKIF_RSP_EOPNOTSUPP
            self._answers[record.entry] = place << 2 | word
            self.ring.put_response(place, record.guest_id, record.operation, status)
            place += 1

    def _release(self, batch: list[Request]) -> None:
        """Free the journal entries of answered requests."""
        for request in batch:
            block = self._blocks[request.tag.entry // BATCH]
            block.live -= 1
            if not block.live:
                self._free_block(block)

    def _free_block(self, block: Block) -> None:
        if not block.plain:
            for record in block.taken:
                record.reset()
                record.request.iov = ()  # it may be hundreds of views
        block.lent = None
        self._free.append(block)

    def _publish(self, answered: int) -> None:
        """Show the frontend all answers before number `answered`."""
        must_notify = self.ring.publish(answered)
        words = self._journal.words
        self.in_flight -= answered - words[RSP_PROD]
        words[RSP_PROD] = answered
        if must_notify:
            self.notifications += 1
            self._channel.notify()

    def _sample(self, block: Block, operation: int) -> None:
        passed = monotonic_ns() - block.started
        block.started = 0  # once, however many pieces it comes back in
        self.samples += 1
        kind = _KIND[operation]
        self.latency_ns[kind] += passed
        self.latency_max_ns = max(self.latency_max_ns, passed)
        self.latency[kind][min(passed.bit_length(), BUCKETS - 1)] += 1

    def _make_block(self) -> Block:
        """Make one more block. There are never more than slots: each block in use holds a request in flight."""
        index = len(self._blocks)
        block = Block(index, self._journal.block_slots(index))
        self._blocks.append(block)
        return block

    def _equip(self, block: Block, count: int, *, is_bound: bool = True) -> int:
        """Give a free block records for a batch of `count`, and return how many it has, one or more.

        Their number is bounded for each ring: otherwise a single unanswered request would keep all records of its
        batch, and a frontend could make us keep 16 records for each slot. At the limit free blocks lose their records
        first; then batches get smaller.
        """
        wanted = count - len(block.records)
        if wanted > self._records_left and is_bound:
            for other in self._free:
                self._records_left += len(other.records)
                other.records = []
            wanted = max(min(wanted, self._records_left), not block.records)
        block.equip(len(block.records) + wanted, self)
        self._records_left -= wanted
        return len(block.records)
