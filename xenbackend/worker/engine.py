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
from xenbackend.blkif.ring import RingOverflow
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.worker.barrier import Barrier
from xenbackend.worker.grants import CopiedGrants, PersistentGrants
from xenbackend.worker.queue import Queue

Call = Callable[[], object]


class Engine:
    """Serves the rings of one vbd through one chain; `queues` are set before the first `serve`."""

    def __init__(
        self,
        submit: Callable[[list[Request]], None],
        kick: Call,
        grants: PersistentGrants | CopiedGrants,
        call_soon: Callable[[Call], None],
        complain: Callable[[str], None],
        alarm: Callable[[str], None],
    ) -> None:
        """Serve a chain whose `complete` is `finish`.

        Args:
            submit: the chain's top.
            kick: starts what the file engine has queued.
            grants: the guest's pages.
            call_soon: calls a function from the loop.
            complain: says a sentence about the guest, as often as the log's budget allows.
            alarm: says a sentence that an administrator must read.
        """
        self.queues: list[Queue] = []
        self.in_flight = 0  # requests lent to the chain
        self.guest_errors = self.bugs = self.turns = 0
        self.paused = False  # a flush failed: nothing is taken any more, and it is not answered
        self._submit_to_chain = submit
        self._kick = kick
        self._grants = grants
        self._call_soon = call_soon
        self._complain = complain
        self._alarm = alarm
        self._mixed = 0  # requests in flight that `finish` must look at one by one
        self._barrier: Barrier | None = None
        self._waiting: list[Queue] = []  # had to stop taking, for memory or for a barrier
        self._failed_flushes: list[Request] = []
        self._then: Call | None = None  # once drained

    def serve(self, queue: Queue) -> None:
        """Take and submit what waits in one ring; re-arm its event channel once it is empty.

        Bounded: after a ring full of requests other rings get their turn.
        """
        if queue.halted:
            return
        queue.is_idle = False
        try:
            while self._take_all(queue):
                self._kick()
                if not queue.ring.final_check():
                    queue.is_idle = True
                    queue.rearm()
                    return
        except RingOverflow as problem:
            queue.halt(str(problem))
        self._kick()

    def finish(self, batch: list[Request]) -> None:
        """Answer what the chain gives back."""
        if self._mixed or self._barrier or len(self.queues) != 1:
            for queue, part in self._sort(batch).items():
                self._answer(queue, part)
        else:
            self.in_flight -= len(batch)
            self._answer(self.queues[0], batch)
        if self._waiting or self._then or self._barrier:
            self._call_soon(self._go_on)

    def drain(self, then: Call) -> None:
        """Take nothing more; call `then` from the loop when nothing is in flight."""
        self._then = then
        self._call_soon(self._go_on)

    def fail_held(self) -> None:
        """Answer the flushes that failed with an error after all: the frontend is going away."""
        for request in self._failed_flushes:
            request.tag.owner.answer([request])
        self._failed_flushes.clear()

    def contain(self, bug: Exception, lent: Sequence[Request]) -> None:
        """End with EIO what a layer still held when it let an exception out (D8).

        Somebody below may hold some of it too and give it back later: so the guest's request gets a new `Request`, and
        the old one belongs to nobody from now on.
        """
        self.bugs += 1
        self._mixed += 1  # for good: a stray request may come back at any time
        self._alarm(f"a layer failed, its requests end with an I/O error: {type(bug).__name__}: {bug}")
        substitutes = []
        for request in lent:
            if request.status == PENDING and request.tag is not None:
                substitute = Request(request.tag)
                substitute.op, substitute.status = request.op, errno.EIO
                if isinstance(request.tag, RingRequest):
                    request.tag.request = substitute
                request.tag = None
                substitutes.append(substitute)
        if substitutes:
            self.finish(substitutes)

    # Taking ---------------------------------------------------------------------------------------------------------

    def _take_all(self, queue: Queue) -> bool:
        """Take what waits; False if the ring is not empty yet and somebody will call `serve` again."""
        grants = self._grants
        left = queue.ring.size
        while left > 0:
            room = grants.room(left)
            if not room or self._barrier or self.paused or self._then:
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
                    block.lent = batch[:]
                    self._submit(batch)
                    continue
            self._lend_others(block.taken)
        self._call_soon(partial(self.serve, queue))
        return False

    def _submit(self, batch: list[Request]) -> None:
        self.in_flight += len(batch)
        lent = batch[:]  # the list belongs to the layers from now on
        try:
            self._submit_to_chain(batch)
        except Exception as bug:  # D8: a layer's bug is contained to what it held
            self.contain(bug, lent)

    def _lend_others(self, records: Sequence[RingRequest]) -> None:
        """Lend requests of every kind; those that break a rule, or have nothing to do, are answered at once."""
        data: list[RingRequest] = []
        ready: list[Request] = []
        for place, record in enumerate(records):
            if record.indirect:
                queue: Queue = record.owner
                copy = queue.indirect_copy(record)
                self._grants.fetch_indirect(record, copy)
                if record.refused is None:
                    queue.decode_indirect(record, copy)
            if record.refused is not None:
                continue
            if record.operation == BLKIF_OP_WRITE_BARRIER or (
                record.operation == BLKIF_OP_FLUSH_DISKCACHE and record.length
            ):
                self._lend_and_submit(data, ready)
                self._answer_refused(records[:place])
                self._begin_barrier(record, list(records[place + 1 :]))
                return
            if record.operation in (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD):
                ready.append(self._prepare(record))
            else:
                record.grefs = record.grefs or (record.gref,)  # one whole page in a batch with others
                data.append(record)
        self._lend_and_submit(data, ready)
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

    def _lend_and_submit(self, data: list[RingRequest], ready: list[Request]) -> None:
        batch = ready + self._grants.lend(data) if data else ready
        self._mixed += sum(request.op == Op.FLUSH for request in ready)
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
            tag = request.tag
            if tag is None:  # a bug ended it before
                continue
            self.in_flight -= 1
            self._mixed -= request.op == Op.FLUSH
            failed_flush = request.op == Op.FLUSH and request.status not in (0, errno.EOPNOTSUPP)
            if isinstance(tag, Barrier):
                tag.status = request.status
                if failed_flush:
                    self._hold(tag.answer())
            elif failed_flush:
                self._hold(request)
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
            if request.tag.refused is not None and request.status == 0:
                request.status = errno.EIO

    def _hold(self, request: Request) -> None:
        """Keep a failed flush unanswered: a frontend takes an error for success and never flushes again."""
        self.paused = True
        self._failed_flushes.append(request)
        self._alarm(f"a flush failed ({errno.errorcode.get(request.status, request.status)}); the disk is paused")

    # Barriers, waiting, ending --------------------------------------------------------------------------------------

    def _begin_barrier(self, record: RingRequest, behind: list[RingRequest]) -> None:
        write = None
        if record.length:
            self._grants.lend([record])
            if record.refused is not None:
                self._answer_refused([record])
                self._lend_others(behind)
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
        if self._then is not None:
            if not self.in_flight:
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
            self._lend_others(barrier.behind)
            self._kick()
