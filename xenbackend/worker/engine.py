"""One vbd being served: from the rings through the grants into the chain, and back.

Must not read xenstore, log per request, or map anything itself. The data's way, top to bottom:

    Queue.take       slots -> journal entries -> decoded records
    grants.lend      records -> requests whose `iov` is the guest's memory
    submit           the layers; the bottom one does the I/O
    finish           what the chain gives back
    grants.settle    what was read, copied to guests without persistent grants
    Queue.answer     responses -> ring -> notification

What a request may cost here: no dataclass, no closure, no log line, no exception, no attribute chain deeper than one
in a loop. Whatever is not a read or write of one whole page leaves the straight way in `_lend_others`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial

from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    SECTOR,
)
from xenbackend.blkif.request import RingRequest
from xenbackend.blkif.ring import BackRing, RingOverflow
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.worker.barrier import Barrier
from xenbackend.worker.grants import CopiedGrants, PersistentGrants
from xenbackend.worker.polling import Poller
from xenbackend.worker.queue import Block, Queue

Call = Callable[[], object]
_ROUNDS = 8  # of taking everything and looking for more


class Engine:
    """Serves the rings of one vbd through one chain; `queues` are set before the first `serve`."""

    def __init__(
        self,
        submit: Callable[[list[Request]], None],
        kick: Call,
        grants: PersistentGrants | CopiedGrants,
        poller: Poller,
        call_soon: Callable[[Call], None],
        complain: Callable[[str], None],
        alarm: Callable[[str], None],
        on_pause: Callable[[str], None],
    ) -> None:
        """Serve a chain whose `complete` is `finish`.

        Args:
            submit: the chain's top.
            kick: starts what the file engine has queued.
            grants: the guest's pages.
            poller: looks for more before the loop sleeps.
            call_soon: calls a function from the loop.
            complain: says a sentence about the guest, as often as the log's budget allows.
            alarm: says a sentence that an administrator must read.
            on_pause: is told why the disk is paused, once.
        """
        self.queues: list[Queue] = []
        self.in_flight = 0  # requests lent to the chain
        self.guest_errors = self.bugs = self.turns = 0
        self.poller = poller
        self.paused = False  # a flush failed: nothing is taken any more, and it is not answered
        self._submit_to_chain = submit
        self._kick = kick
        self._grants = grants
        self._call_soon = call_soon
        self._complain = complain
        self._alarm = alarm
        self._on_pause = on_pause
        self._mixed = 0  # requests in flight that `finish` must look at one by one
        self._barrier: Barrier | None = None
        self._waiting: list[Queue] = []  # had to stop taking, for memory or for a barrier
        self._failed_flushes: list[Request] = []
        self._disarmed: Queue | None = None  # asks for no event until `look_again`
        self._ending = False  # nothing is taken any more, for good
        self._then: Call | None = None  # once drained

    def serve(self, queue: Queue) -> None:
        """Take and submit what waits in one ring; re-arm its event channel once it is empty.

        Bounded: after a ring full of requests, or a few looks for more, everybody else gets a turn, however fast the
        frontend is.
        """
        if queue.halted:
            return
        queue.is_idle = False
        try:
            for _ in range(_ROUNDS):
                is_empty = self._take_all(queue)
                self._kick()
                if not is_empty:
                    return
                if not self.in_flight and self.poller.finds_work(queue.ring, self._other_rings(queue)):
                    continue
                if not queue.ring.final_check():
                    queue.is_idle = True
                    queue.rearm()
                    return
        except RingOverflow as problem:
            queue.halt(str(problem))
        else:
            self._call_soon(partial(self.serve, queue))

    def look_again(self) -> bool:
        """Before the loop sleeps: see whether the answers just given have brought new requests; True if so."""
        queue, self._disarmed = self._disarmed, None
        if queue is None:
            return False
        ring = queue.ring
        try:
            finds_work = not self.in_flight and self.poller.finds_work(ring, ())
            if not finds_work and not ring.final_check():
                queue.is_idle = True
                return False
        except RingOverflow:
            pass  # `serve` meets it too, and halts the ring
        self.serve(queue)
        return True

    def finish(self, batch: list[Request]) -> None:
        """Answer what the chain gives back."""
        if self._mixed or self._barrier or len(self.queues) != 1:
            for queue, part in self._sort(batch).items():
                self._answer(queue, part)
        else:
            self.in_flight -= len(batch)
            queue = self.queues[0]
            if not self.in_flight and queue.is_idle and self.poller.may_look():
                # The next request will be there within microseconds: the frontend need not kick us for it.
                queue.ring.disarm()
                queue.is_idle = False
                self._disarmed = queue
            self._answer(queue, batch)
        if self._waiting or self._then or self._barrier:
            self._call_soon(self._go_on)

    def drain(self, then: Call) -> None:
        """Take nothing more; call `then` from the loop when nothing is in flight."""
        self._ending = True
        self._then = then
        self._call_soon(self._go_on)

    def fail_held(self) -> None:
        """Answer the flushes that failed with an error after all: the frontend is going away."""
        for request in self._failed_flushes:
            request.status = errno.EIO
            request.tag.owner.answer([request])
        self._failed_flushes.clear()

    def expect_strays(self) -> None:
        """Look at each request that comes back: one of an earlier connection's may be among them, after a bug."""
        self._mixed += 1

    def contain(self, bug: Exception, lent: Sequence[Request]) -> None:
        """End with EIO what a layer still held when it let an exception out (D8).

        Somebody below may hold some of it too and give it back later: so the guest's request gets a new `Request`, and
        the old one belongs to nobody from now on.
        """
        self.bugs += 1
        self.expect_strays()  # for good: one may come back at any time
        self._alarm(f"a layer failed, its requests end with an I/O error: {type(bug).__name__}: {bug}")
        substitutes = []
        for request in lent:
            if self._is_ours(request) and not self._has_come_back(request):
                substitute = Request(request.tag)
                substitute.op, substitute.status = request.op, errno.EIO
                record = request.tag.record if isinstance(request.tag, Barrier) else request.tag
                if record.request is request:
                    record.request = substitute
                    self._grants.abandon(record, request)
                request.tag = None
                substitutes.append(substitute)
        if substitutes:
            self.finish(substitutes)

    def _is_ours(self, request: Request) -> bool:
        """False for a request that a layer made for itself, and for one that a bug had ended before."""
        tag = request.tag
        return isinstance(tag, Barrier) or (isinstance(tag, RingRequest) and tag.request is request)

    def _has_come_back(self, request: Request) -> bool:
        """True if `finish` saw the request. Its status does not tell: a layer on its way up may have lost it."""
        tag = request.tag
        if isinstance(tag, Barrier):
            return tag.step is not request
        return request in self._failed_flushes or tag.owner.has_answered(tag)

    # Taking ---------------------------------------------------------------------------------------------------------

    def _take_all(self, queue: Queue) -> bool:
        """Take what waits; False if the ring is not empty yet and somebody will call `serve` again."""
        grants = self._grants
        left = queue.ring.size
        while left > 0:
            room = grants.room(left)
            if not room or self._barrier or self.paused or self._ending:
                self._waiting.append(queue)
                return False
            block = queue.take(room)
            if block is None:
                self.turns += 1
                return True
            left -= len(block.taken)
            if block.plain:
                batch = grants.lend_plain(block.taken)
                if len(batch) == len(block.taken):
                    block.lent = batch
                    self._submit(batch)
                    continue
                block.plain = False  # some were refused, which must be forgotten when their records are free
                if batch:
                    self._submit(batch)
                self._answer_refused(block.taken)
            else:
                self._lend_others(block.taken, block)
        self._call_soon(partial(self.serve, queue))
        return False

    def _other_rings(self, queue: Queue) -> list[BackRing]:
        return [other.ring for other in self.queues if other is not queue and other.is_idle]

    def _submit(self, batch: list[Request]) -> None:
        self.in_flight += len(batch)
        try:
            self._submit_to_chain(batch[:])  # a list of its own: it belongs to the layers from now on
        except Exception as bug:  # D8: a layer's bug is contained to what it held
            self.contain(bug, batch)

    def _lend_others(self, records: Sequence[RingRequest], block: Block | None) -> None:
        """Lend requests of every kind; those that break a rule are answered at once. `block` is all theirs, if any."""
        data: list[RingRequest] = []
        ready: list[Request] = []
        for place, record in enumerate(records):
            if record.indirect:
                queue: Queue = record.owner
                copy = queue.indirect_copies[record.entry]
                self._grants.fetch_indirect(record, copy)
                if record.refused is None:
                    queue.decode_indirect(record, copy)
                if record.refused is None:  # and only reads and writes are ever indirect
                    data.append(record)
                continue
            if record.spans is None:  # one whole page among others; what `grefs` says is from an earlier use
                record.grefs = (record.gref,)
            if record.refused is not None:
                continue
            if record.operation == BLKIF_OP_WRITE_BARRIER or (
                record.operation == BLKIF_OP_FLUSH_DISKCACHE and record.length
            ):
                self._lend_and_submit(data, ready, None)
                self._answer_refused(records[:place])
                self._begin_barrier(record, list(records[place + 1 :]))
                return
            if record.operation in (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD):
                ready.append(self._prepare(record))
            else:
                data.append(record)
        self._lend_and_submit(data, ready, block)
        self._answer_refused(records)

    def _prepare(self, record: RingRequest) -> Request:
        """Make the request of a record without data."""
        request: Request = record.request
        request.op = Op.DISCARD if record.operation == BLKIF_OP_DISCARD else Op.FLUSH
        request.offset = record.first_sector * SECTOR if request.op == Op.DISCARD else 0
        request.length = record.length
        request.iov = ()
        request.status = PENDING
        return request

    def _lend_and_submit(self, data: list[RingRequest], ready: list[Request], block: Block | None) -> None:
        batch = self._grants.lend(data) if data else []
        if ready:
            self._mixed += sum(request.op == Op.FLUSH for request in ready)
            batch = ready + batch
        elif block is not None and len(batch) == len(block.taken):
            block.lent = batch
        if batch:
            self._submit(batch)

    def _answer_refused(self, records: Sequence[RingRequest]) -> None:
        """Answer those that broke a rule; the sentence about the last one is enough."""
        refused = [record for record in records if record.refused is not None]
        if not refused:
            return
        self.guest_errors += len(refused)
        for record in refused:
            assert record.refused is not None  # noqa: S101 - chosen above
            unsupported = record.refused.status == BLKIF_RSP_EOPNOTSUPP
            record.request.status = errno.EOPNOTSUPP if unsupported else errno.EIO
        self._complain(str(refused[-1].refused))
        batch = [record.request for record in refused]
        if self._grants.held:
            self._grants.settle(refused)
        refused[0].owner.answer(batch)

    # Giving back ----------------------------------------------------------------------------------------------------

    def _sort(self, batch: list[Request]) -> dict[Queue, list[Request]]:
        """Return what is to be answered by ring; flushes that failed and steps of a barrier are not."""
        batch_of: dict[Queue, list[Request]] = {}
        for request in batch:
            if request.op == Op.FLUSH and request.status not in (0, errno.EOPNOTSUPP):
                self._pause(request.status)
        for request in batch:
            tag = request.tag
            if tag is None:  # a bug ended it before
                self._grants.reclaim(request)
                continue
            self.in_flight -= 1
            self._mixed -= request.op == Op.FLUSH
            # A failed flush takes all others with it: the kernel reports what was lost to one of them only.
            is_held = request.op == Op.FLUSH and self.paused
            if isinstance(tag, Barrier):
                tag.end_step(request.status)
                if is_held:
                    self._failed_flushes.append(tag.answer())
            elif is_held:
                self._failed_flushes.append(request)
            else:
                batch_of.setdefault(tag.owner, []).append(request)
        return batch_of

    def _answer(self, queue: Queue, batch: list[Request]) -> None:
        if self._grants.held:
            self._settle(batch)
        queue.answer(batch)

    def _settle(self, batch: list[Request]) -> None:
        self._grants.settle([request.tag for request in batch])
        for request in batch:
            refused = request.tag.refused
            if refused is not None:  # a page could not be written
                request.tag.refused = None  # it is answered now, whatever becomes of the rest of its block
                request.status = errno.EIO
                self.guest_errors += 1
                self._complain(str(refused))

    def _pause(self, status: int) -> None:
        """Stop for good after a failed flush, and answer none: a frontend takes an error for success, for ever."""
        if not self.paused:
            self.paused = True
            sentence = f"a flush failed ({errno.errorcode.get(status, status)}); the disk is paused"
            self._alarm(sentence)
            self._on_pause(sentence)

    # Barriers, waiting, ending --------------------------------------------------------------------------------------

    def _begin_barrier(self, record: RingRequest, behind: list[RingRequest]) -> None:
        write = None
        if record.length:
            self._grants.lend([record])
            if record.refused is not None:
                self._answer_refused([record])
                self._lend_others(behind, None)
                return
            write = record.request
        self._barrier = Barrier(record, write, behind)
        self._call_soon(self._go_on)

    def _go_on(self) -> None:
        """Take the next step of whatever waits for requests in flight."""
        if self._barrier is not None and not self.paused:
            if self.in_flight:
                return
            step = self._barrier.next_step()
            if step is not None:
                self._mixed += step.op == Op.FLUSH
                self._submit([step])
                self._kick()
                return
            self._end_barrier(self._barrier)
        if self._ending:
            if self._then is not None and not self.in_flight and (self._barrier is None or self.paused):
                then, self._then = self._then, None
                then()
            return
        waiting, self._waiting = self._waiting, []
        for queue in waiting:
            self.serve(queue)

    def _end_barrier(self, barrier: Barrier) -> None:
        self._barrier = None
        request = barrier.answer()
        self._answer(request.tag.owner, [request])
        if barrier.behind:
            self._lend_others(barrier.behind, None)
            self._kick()
