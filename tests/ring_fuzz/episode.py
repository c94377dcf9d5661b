"""One connection's worth of messages: sent in batches, some rewritten meanwhile, each answer compared with the verdict.

Must not share anything with the episode before but the bed and what is kept: its number and the seed say all of it,
but for the moments at which the second process writes.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass, field
from random import Random

from tests.ring_fuzz import messages
from tests.ring_fuzz.bed import Bed, Violation
from tests.ring_fuzz.judge import DISCARD, INDIRECT, Verdict, judge
from tests.ring_fuzz.messages import FIRST, POOL, Maker, Message
from tests.ring_fuzz.pages import is_harmless
from tests.ring_fuzz.rewriter import MOST, Field
from xenbackend.blkif.abi import REQ_EVENT, REQ_PROD, RING_HEADER, RSP_EVENT, RSP_PROD
from xenbackend.block.request import Op
from xenbackend.rig.pattern import WrongData
from xenbackend.units import PAGE

LENGTH = 1000  # messages of one episode
_PASSES = 400  # of the loop, for one batch
_RECENT = 64
_KICKS = (*[1] * 15, 20)


Sent = tuple[Message, Verdict, bytes]  # a message in flight, what is right, and the bytes of that response


@dataclass
class Tally:
    """What came of episodes, by words; `kept` has a message for each way in which one is answered."""

    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Message] = field(default_factory=dict)

    def count(self, word: str, number: int = 1) -> None:
        """Count something."""
        self.counts[word] = self.counts.get(word, 0) + number


class Episode:
    """Messages from one connect to one disconnect.

    spoiled   indices that are written while messages are read
    """

    spoiled: tuple[int, ...] = (REQ_EVENT, RSP_EVENT, RSP_PROD)

    def __init__(self, bed: Bed, seed: int, number: int, corpus: list[Message], tally: Tally) -> None:
        self.bed = bed
        self.random = Random(f"{seed} {number}")
        self.maker = Maker(self.random)
        self.corpus = list(corpus)
        self.signatures: set[tuple[int, int, str, int]] = set()
        self.names: set[str] = set()
        self.tally = tally
        self.recent: deque[Message] = deque(maxlen=_RECENT)
        self.number = 0  # of messages
        self.in_flight: dict[int, Sent] = {}
        self.others: dict[int, list[Verdict]] = {}  # what else is right, by id, as a message is being rewritten

    def run(self, length: int = LENGTH) -> None:
        """Send so many messages. Raises: Violation."""
        bed, random = self.bed, self.random
        bed.connect(random)
        try:
            while self.number < length and not bed.queue.halted:
                self._set_disk()
                self._batch(random.randint(1, bed.queue.ring.size))
            if random.random() < 0.5:
                self._break_indices()
        except WrongData as wrong:
            raise Violation(f"the neighbour's data: {wrong}") from wrong
        bed.disconnect()
        self.tally.count("episodes")

    def _set_disk(self) -> None:
        disk, random = self.bed.disk, self.random
        disk.holding = random.random() < 0.3
        disk.errors = {}
        if random.random() < 0.05:
            disk.errors = {Op.DISCARD: errno.EOPNOTSUPP}

    def _choose(self) -> Message:
        random, maker = self.random, self.maker
        choice = random.random()
        if choice < 0.5:
            return maker.make()
        if choice < 0.75 and self.corpus:
            return maker.change(random.choice(self.corpus))
        if choice < 0.95 and self.recent:
            return maker.change(random.choice(self.recent))
        return maker.noise()

    # a batch

    def _batch(self, count: int) -> None:
        bed, random, ring = self.bed, self.random, self.bed.hostile.ring
        first = ring.produced
        bed.load.top_up(random.randint(0, 3))  # first: what it grants is known to the judge then
        slots = [self._put(place) for place in range(count)]
        rewritten = random.random() < 0.06
        dirty: set[int] = set()
        if rewritten:
            fields = self._choose_fields(first, slots, dirty)
            bed.rewriter.begin(fields)
            self.tally.count("rewritten", len(fields))
        elif random.random() < 0.1:
            for word in self.spoiled:
                ring.index[word] = random.getrandbits(random.choice((3, 32)))
        ring.push()
        for _ in range(random.choice(_KICKS)):
            bed.hostile.port.notify()
        self._await_answers()
        if rewritten:
            bed.rewriter.end()
        for place in range(count):
            self._take(is_dirty=bool(dirty) and (first + place) & (ring.size - 1) in dirty)
        if rewritten:
            self.in_flight.clear()
            self.others.clear()
        if self.in_flight:
            raise Violation(f"{len(self.in_flight)} messages have no answer of their own")
        bed.disk.allowed.clear()
        bed.disk.open.clear()
        if random.random() < 0.2:
            self._finish_neighbour()
        self.tally.count("messages", count)
        self.number += count

    def _put(self, place: int) -> tuple[int, bytes]:
        """Put one message into the ring; return its id and its slot."""
        bed, agreed = self.bed, self.bed.agreed
        layout, own = agreed.layout, bed.lists[place]
        while True:
            message = self._choose()
            if message.segments:
                bed.list_pages[place][: len(message.segments)] = message.segments
            guest_id = self.random.getrandbits(40) << 24 | self.number + place
            slot = messages.encode(message, layout, guest_id, own)
            verdict = judge(slot, agreed, own)
            if is_harmless(verdict, agreed):
                break
        self.recent.append(message)
        answer = layout.response.pack(guest_id, verdict.operation, verdict.status)
        self.in_flight[guest_id] = (message, verdict, answer)
        self._allow(guest_id, verdict)
        bed.hostile.ring.put(slot)
        return guest_id, slot

    def _allow(self, guest_id: int, verdict: Verdict) -> None:
        if verdict.is_open:
            self.bed.disk.open.add(guest_id)
        if verdict.disk is not None:
            self.bed.disk.allowed.setdefault(guest_id, []).append(verdict.disk)

    def _await_answers(self) -> None:
        bed, random = self.bed, self.random
        for _ in range(_PASSES):
            bed.step()
            if bed.disk.wrong:
                raise Violation(bed.disk.wrong)
            if bed.queue.ring.answered & 0xFFFFFFFF == bed.hostile.ring.produced & 0xFFFFFFFF:
                return
            held = bed.disk.held
            if held:
                some = random.random() < 0.6
                bed.disk.give_back(random.sample(held, random.randint(1, len(held))) if some else held)
        if not bed.queue.halted:
            missing = bed.hostile.ring.produced - bed.queue.ring.answered
            raise Violation(f"{missing} messages have no answer after {_PASSES} passes of the loop")

    def _take(self, *, is_dirty: bool) -> None:
        guest_id, operation, status, raw = self.bed.hostile.ring.take()
        if is_dirty:  # the guest itself wrote over this answer
            return
        sent = self.in_flight.pop(guest_id, None)
        if sent is None:
            raise Violation(f"an answer with the id {guest_id:#x}, which is not in flight")
        message, verdict, answer = sent
        if raw != answer:
            self._look_closely(sent, raw, guest_id, operation, status)
        if guest_id not in self.others:
            self._keep(message, verdict)

    def _look_closely(self, sent: Sent, raw: bytes, guest_id: int, operation: int, status: int) -> None:
        """Look whether an answer that is not the first one that is right is another one."""
        if raw != self.bed.agreed.layout.response.pack(guest_id, operation, status):
            raise Violation(f"padding that is not zero: {raw.hex()}")
        unsupported = self.bed.disk.errors.get(Op.DISCARD)
        message, verdict, _ = sent
        verdicts = (verdict, *self.others.get(guest_id, ()))
        for each in verdicts:
            if each.operation == operation and (
                each.is_open or each.status == status or (unsupported and each.why == "discards" and status == -2)
            ):
                return
        raise Violation(f"{message} was answered ({operation}, {status}) where {verdicts} are right")

    def _keep(self, message: Message, verdict: Verdict) -> None:
        """Keep a message that is answered as none before it, to change it further."""
        operation, status, why, *_ = verdict
        key = (message.slot[0], operation, why, status)
        if key in self.signatures:
            return
        self.signatures.add(key)
        form = {DISCARD: "discard", INDIRECT: "indirect"}.get(message.slot[0], "direct")
        name = f"{form} {operation if operation in messages.OPERATIONS[:7] else 'other'} {why} {status}"
        if name not in self.names:
            self.names.add(name)
            self.corpus.append(message)
        self.tally.kept.setdefault(name, message)

    def _finish_neighbour(self) -> None:
        self.bed.disk.holding = False
        if self.bed.disk.held:
            self.bed.disk.give_back()
        self.bed.load.finish()

    # rewriting

    def _choose_fields(self, first: int, slots: list[tuple[int, bytes]], dirty: set[int]) -> list[Field]:
        """Return fields to rewrite; what each message may be then, in either content, is right."""
        fields = []
        random = self.random
        for place in random.sample(range(len(slots)), min(len(slots), random.randint(1, max(6, len(slots) * 2 // 3)))):
            guest_id, slot = slots[place]
            number = (first + place) & (self.bed.hostile.ring.size - 1)
            if random.random() < 0.2 and self.in_flight[guest_id][0].segments:
                chosen = self._list_field(guest_id, slot, place)
            else:
                chosen = self._slot_field(guest_id, slot, number, place, dirty)
            if chosen is not None:
                fields.append(chosen)
        if random.random() < 0.3:
            word = random.choice(self.spoiled)
            fields.append(Field(self._ring_address(4 * word), 4, random.getrandbits(32), random.getrandbits(3)))
        return fields[:MOST]

    def _ring_address(self, byte: int) -> int:
        return self.bed.hostile._frames[byte // PAGE] * PAGE + byte % PAGE

    def _slot_field(self, guest_id: int, slot: bytes, number: int, place: int, dirty: set[int]) -> Field | None:
        random, layout = self.random, self.bed.agreed.layout
        at = random.choice((0, 1, 2, 16, 20, *range(20, 20 + 8 * 4, 4), *range(20, 52)))
        width = random.choice([each for each in (1, 2, 4) if at % each == 0 and each <= 4])
        byte = RING_HEADER + number * layout.slot_size + at
        if byte % width:
            return None
        other = int.from_bytes(slot[at : at + width], "little") ^ random.choice(
            (1, 0x80, random.getrandbits(8 * width))
        )
        other &= (1 << 8 * width) - 1
        changed = slot[:at] + other.to_bytes(width, "little") + slot[at + width :]
        verdict = judge(changed, self.bed.agreed, self.bed.lists[place])
        if not is_harmless(verdict, self.bed.agreed):
            return None
        self._add(guest_id, verdict)
        if at < layout.response.size:
            dirty.add(number)  # an answer lies there, too
        return Field(self._ring_address(byte), width, int.from_bytes(slot[at : at + width], "little"), other)

    def _list_field(self, guest_id: int, slot: bytes, place: int) -> Field | None:
        bed, random = self.bed, self.random
        gref = bed.lists[place]
        page = bed.list_pages[place]
        at = random.randrange(0, 8 * 32, 4)
        before = bytes(page[at : at + 4])
        after = random.choice(
            (b"\0\7\0\0", b"\7\0\0\0", b"\xff\xff\0\0", random.randrange(FIRST, FIRST + POOL).to_bytes(4, "little"))
        )
        page[at : at + 4] = after
        verdict = judge(slot, bed.agreed, gref)
        page[at : at + 4] = before
        if not is_harmless(verdict, bed.agreed):
            return None
        self._add(guest_id, verdict)
        return Field(bed.frames[gref] * PAGE + at, 4, *(int.from_bytes(each, "little") for each in (before, after)))

    def _add(self, guest_id: int, verdict: Verdict) -> None:
        self.others.setdefault(guest_id, []).append(verdict)
        self._allow(guest_id, verdict)

    # the ring itself

    def _break_indices(self) -> None:
        """Write nonsense into the indices: the ring is stopped at worst, and the other one is not."""
        bed, random, ring = self.bed, self.random, self.bed.hostile.ring
        bed.disk.attacked = None  # the slots hold anything by now
        for slot in range(ring.size):  # but not what a guest does to its own first half
            at = RING_HEADER + slot * bed.agreed.layout.slot_size
            bed.hostile.ring.pages[at : at + 1] = bytes((random.choice((77, 200, 3)),))
            bed.hostile.ring.pages[at + 1 : at + 2] = b"\0"
        for _ in range(random.randint(1, 6)):
            for word in (REQ_EVENT, RSP_PROD, RSP_EVENT, REQ_PROD):
                ring.index[word] = random.getrandbits(random.choice((3, 32)))
            taken = bed.queue.ring
            ahead = (ring.index[REQ_PROD] - taken.consumed) & 0xFFFFFFFF
            is_too_much = ahead > ring.size - (taken.consumed - taken.answered)
            bed.hostile.port.notify()
            for _ in range(4):
                bed.step()
            if is_too_much and not bed.queue.halted:
                raise Violation(f"{ahead} requests were announced where the ring has no room for them, and it goes on")
            bed.load.top_up(2)
            self.tally.count("messages")
        if bed.queue.halted and len(bed.vbd.halted) != 1:
            raise Violation(f"the end of one ring was told {len(bed.vbd.halted)} times")
        self.tally.count("stopped rings", bed.queue.halted)
