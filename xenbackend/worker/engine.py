"""One vbd being served: from the rings through the grants into the chain, and back.

Must not read xenstore, log per request, or map anything itself. The path of the data, top to bottom:

    Queue.take       slots -> journal entries -> decoded records
    grants.lend      records -> requests whose `iov` is the guest's memory
    submit           the layers; the bottom one does the I/O
    finish           takes requests back from the chain
    grants.settle    copies what was read to guests without persistent grants
    Queue.answer     responses -> ring -> notification

To keep requests cheap, this code has no dataclass, no closure, no log line, no exception, and in loops no attribute
chain deeper than one. Requests that are not reads or writes of one whole page go through `_lend_others`.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from xenbackend.blkif.abi import BLKIF_RSP_EOPNOTSUPP
from xenbackend.blkif.request import RingRequest
from xenbackend.blkif.ring import BackRing, RingOverflow
from xenbackend.block.request import AWAY, PENDING, Op, Request
from xenbackend.worker.barrier import Barrier
from xenbackend.worker.channel import Reports
from xenbackend.worker.fault import is_ours, substitute
from xenbackend.worker.grants import CopiedGrants, PersistentGrants
from xenbackend.worker.holds import Hold, Holds
from xenbackend.worker.odd_requests import sort_out
from xenbackend.worker.polling import Poller
from xenbackend.worker.queue import Block, Queue
from xenbackend.worker.retries import Retries

Call = Callable[[], object]
_ANSWERS = frozenset((0, errno.EOPNOTSUPP))  # statuses that are no failure
_NO_FAILED_FLUSH = _ANSWERS | {AWAY}  # AWAY: nobody has tried the flush, so it is tried again
_ROUNDS = 8  # of taking everything and looking for more


def _nothing() -> None:
    """Do nothing: no layer holds anything back."""


class Engine:
    """Serves the rings of one vbd through one chain; `queues` are set before the first `serve`."""

    def __init__(
        self,
        submit: Callable[[list[Request]], None],
        kick: Call,
        grants: PersistentGrants | CopiedGrants,
        poller: Poller,
        call_soon: Callable[[Call], None],
        channel: Reports,
        on_flush_failed: Callable[[int], None],
        retries: Retries,
    ) -> None:
        """Serve a chain whose `complete` is `finish`.

        Args:
            submit: the chain's top.
            kick: starts I/O that was queued below it.
            grants: the guest's pages.
            poller: looks for more requests before the loop sleeps.
            call_soon: calls a function from the loop.
            channel: gets complaints about the guest, and what an administrator must read.
            on_flush_failed: called once, with the errno of a flush that failed, before anything else happens.
            retries: keeps requests that failed until they are tried again.
        """
        self.queues: list[Queue] = []
        self.in_flight = 0  # requests lent to the chain
        self.guest_errors = self.bugs = self.turns = 0
        self.poller = poller
        self.holds = Holds()
        self.retries = retries
        self.release: Call = _nothing  # has the chain pass on what its layers hold back; set with the chain
        retries.again = self._try_what_is_due
        self._submit_to_chain = submit
        self._kick = kick
        self._grants = grants
        self._call_soon = call_soon
        self._channel = channel
        self._on_flush_failed = on_flush_failed
        self._flushes = 0  # in flight: while there is one, requests that come back are checked one by one
        self._expects_strays = False  # as above, for good: requests that a layer's bug had ended may come back
        self._barrier: Barrier | None = None
        self._waiting: list[Queue] = []  # had to stop taking: no memory, a barrier or a hold
        self._failed_flushes: list[Request] = []
        self._replays: deque[list[RingRequest]] = deque()
        self._disarmed: Queue | None = None  # its frontend need not notify us until `look_again`

    def serve(self, queue: Queue) -> None:
        """Take and submit the requests that wait in one ring; re-arm its event channel once it is empty.

        Bounded: after a ring full of requests, or a few looks for more, the loop gets its turn, however fast the
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
        """Check before the loop sleeps whether the last answers have brought new requests; True if so."""
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
        """Take requests back from the chain, and answer them."""
        if self._flushes or self._expects_strays or self._barrier or len(self.queues) != 1:
            for queue, part in self._sort(batch).items():
                self._answer(queue, part)
        else:
            self.in_flight -= len(batch)
            queue = self.queues[0]
            if not self.in_flight and queue.is_idle and self.poller.may_look():
                # The next request will be there within microseconds: the frontend need not notify us.
                queue.ring.disarm()
                queue.is_idle = False
                self._disarmed = queue
            self._answer(queue, batch)
        if self._waiting or self._barrier or self.holds.awaits_quiet():
            self._call_soon(self._go_on)

    def hold(self, why: Hold, then: Call | None = None) -> None:
        """Take nothing more until `let_go`; call `then`, if any, from the loop when nothing is in flight."""
        self.holds.add(why, then)
        if then is not None:
            self._call_soon(self._release)
        self._call_soon(self._go_on)

    def let_go(self, why: Hold, submit: Callable[[list[Request]], None] | None = None) -> None:
        """End a hold, and enter another chain if `submit` is given; try failed requests again if no hold bars it."""
        self._submit_to_chain = submit or self._submit_to_chain
        self.holds.remove(why)
        if not self.holds.bar_retries():
            flushes, self._failed_flushes = self._failed_flushes, []
            self._submit_again([*flushes, *self.retries.give_back()])
        self._call_soon(self._go_on)

    def go_through(self, submit: Callable[[list[Request]], None]) -> None:
        """Enter the chain by `submit` from now on; requests in flight come back as before."""
        self._submit_to_chain = submit

    def flush_failed(self, code: int) -> None:
        """Answer no flush from now on, as one failed with errno `code`: blkfront would take an error for success."""
        if Hold.FLUSH not in self.holds:
            self._on_flush_failed(code)
            self.holds.add(Hold.FLUSH)

    def go_on_with(self, records: list[RingRequest]) -> None:
        """Do what a predecessor took from one ring and did not answer, in the ring's order, before new requests."""
        self.holds.add(Hold.REPLAY)
        self._replays.append(records)
        self._call_soon(self._go_on)

    def fail_held(self) -> None:
        """Answer all requests that were held back, with an error: the frontend is going away."""
        for request in [*self._failed_flushes, *self.retries.give_up()]:
            request.status, tag = request.status or errno.EIO, request.tag
            answer = request
            if isinstance(tag, Barrier):
                tag.end_step(request.status)
                answer, tag, self._barrier = tag.answer(), tag.record, None
            self._answer_now(tag.owner, [answer])
        self._failed_flushes.clear()

    def expect_strays(self) -> None:
        """Check each request that comes back: after a bug, requests of an earlier connection may be among them."""
        self._expects_strays = True

    def contain(self, bug: Exception, lent: Sequence[Request]) -> None:
        """End with EIO the requests that a layer still held when it raised an exception (D8)."""
        self.bugs += 1
        self.expect_strays()
        self._channel.alarm(f"a layer failed, its requests end with an I/O error: {type(bug).__name__}: {bug}")
        lost = [each for each in lent if is_ours(each) and not self._has_come_back(each)]
        substitutes = [substitute(request, self._grants) for request in lost]
        for request in lost:
            self.retries.forget(request)
        self.retries.refuse(substitutes)
        if substitutes:
            self.finish(substitutes)

    def _has_come_back(self, request: Request) -> bool:
        """True if `finish` saw the request. Its status does not tell: a layer on its way up may have lost it."""
        tag = request.tag
        if request in self._failed_flushes or request in self.retries:
            return True
        return tag.step is not request if isinstance(tag, Barrier) else tag.owner.has_answered(tag)

    def _take_all(self, queue: Queue) -> bool:
        """Take what waits; False if the ring is not empty yet, and `serve` will be called again."""
        grants = self._grants
        left = queue.ring.size
        while left > 0:
            room = grants.room(left)
            if not room or self._barrier or self.holds.reasons:
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
                block.plain = False  # some were refused: their records must be reset when they are freed
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
            self._submit_to_chain(batch[:])  # a copy: the list belongs to the layers from now on
        except Exception as bug:  # D8: a layer's bug costs only the requests that it held
            self.contain(bug, batch)
        if self.holds.reasons:
            self._release()

    def _release(self) -> None:
        """If somebody waits until nothing is in flight, have layers pass on what they hold back on purpose."""
        if self.holds.awaits_quiet():
            self.release()
            self._kick()

    def _try_what_is_due(self) -> None:
        if not self.holds.bar_retries():
            self._submit_again(self.retries.due())

    def _submit_again(self, batch: list[Request]) -> None:
        """Submit requests that do not come from a ring right now."""
        for request in batch:
            request.status = PENDING
            self._flushes += request.op == Op.FLUSH
        if batch:
            self._submit(batch)
            self._kick()

    def _lend_others(self, records: Sequence[RingRequest], block: Block | None) -> None:
        """Lend requests of every kind; answer at once those that break a rule. `block`, if any, holds only these."""
        found = sort_out(records, self._grants)
        self._lend_and_submit(found.data, found.ready, block if found.barrier is None else None)
        self._answer_refused(found.before)
        if found.barrier is not None:
            self._begin_barrier(found.barrier, found.behind)

    def _lend_and_submit(self, data: list[RingRequest], ready: list[Request], block: Block | None) -> None:
        batch = self._grants.lend(data) if data else []
        if ready:
            self._flushes += sum(request.op == Op.FLUSH for request in ready)
            batch = ready + batch
        elif block is not None and len(batch) == len(block.taken):
            block.lent = batch
        if batch:
            self._submit(batch)

    def _answer_refused(self, records: Sequence[RingRequest]) -> None:
        """Answer records that broke a rule, and complain about the last one of them."""
        refused = [record for record in records if record.refused is not None]
        if not refused:
            return
        self.guest_errors += len(refused)
        for record in refused:
            assert record.refused is not None  # noqa: S101 - chosen above
            unsupported = record.refused.status == BLKIF_RSP_EOPNOTSUPP
            record.request.status = errno.EOPNOTSUPP if unsupported else errno.EIO
        self._channel.complain(str(refused[-1].refused))
        batch = [record.request for record in refused]
        if self._grants.held:
            self._grants.settle(refused)
        refused[0].owner.answer(batch)

    def _sort(self, batch: list[Request]) -> dict[Queue, list[Request]]:
        """Return the requests to answer, by ring: without failed flushes and a barrier's steps."""
        batch_of: dict[Queue, list[Request]] = {}
        for request in batch:
            if request.op == Op.FLUSH and request.status not in _NO_FAILED_FLUSH:
                self.flush_failed(request.status)
        for request in batch:
            tag = request.tag
            if tag is None:  # a bug ended it before
                self._grants.reclaim(request)
                continue
            self.in_flight -= 1
            self._flushes -= request.op == Op.FLUSH
            # A failed flush fails all others in flight: the kernel reports lost data to only one of them.
            if request.op == Op.FLUSH and Hold.FLUSH in self.holds:
                self._failed_flushes.append(request)
            elif isinstance(tag, Barrier):
                if not self._is_kept(request):
                    tag.end_step(request.status)
            else:
                batch_of.setdefault(tag.owner, []).append(request)
        return batch_of

    def _answer(self, queue: Queue, batch: list[Request]) -> None:
        if not self._grants.held and queue.answer_whole(batch):
            return
        batch = [request for request in batch if not self._is_kept(request)]
        if batch:
            self._answer_now(queue, batch)

    def _answer_now(self, queue: Queue, batch: list[Request]) -> None:
        if self._grants.held:
            self._settle(batch)
        queue.answer(batch)

    def _is_kept(self, request: Request) -> bool:
        """Keep a request that has failed if it is to be tried again, and return whether it is kept."""
        if request.status in _ANSWERS:
            self.retries.forget(request)
        elif self.retries.take(request):
            if not isinstance(request.tag, Barrier):
                request.tag.owner.break_up(request.tag)
            return True
        return False

    def _settle(self, batch: list[Request]) -> None:
        self._grants.settle([request.tag for request in batch])
        for request in batch:
            refused = request.tag.refused
            if refused is not None:  # a page could not be written
                request.tag.refused = None  # it is answered now, whatever becomes of the rest of its block
                request.status = errno.EIO
                self.guest_errors += 1
                self._channel.complain(str(refused))

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
        """Continue what waits for requests in flight: a barrier, a replay, holds, rings."""
        barrier = self._barrier
        if barrier is not None and Hold.FLUSH not in self.holds:
            if self.in_flight:
                return
            if barrier.step is None and not len(self.retries):  # else a step, or a request before it, is kept
                step = barrier.next_step()
                if step is not None:
                    self._submit_again([step])
                    return
                self._end_barrier(barrier)
        may_replay = Hold.PAUSE not in self.holds or Hold.END in self.holds  # at the end nobody after us could do it
        if Hold.REPLAY in self.holds and may_replay and not self._barrier:
            self._replay_next()
        if self.holds:
            is_stuck = Hold.FLUSH in self.holds or len(self._failed_flushes) + len(self.retries) > 0
            if not self.in_flight and (self._barrier is None or is_stuck):
                self.holds.quiet()
            return
        waiting, self._waiting = self._waiting, []
        for queue in waiting:
            self.serve(queue)

    def _replay_next(self) -> None:
        """Do what a predecessor left, ring by ring; a barrier must end before the next ring's turn."""
        while self._replays and not self._barrier:
            self._lend_others(self._replays.popleft(), None)
        self._kick()
        if not self._barrier:
            self.holds.remove(Hold.REPLAY)

    def _end_barrier(self, barrier: Barrier) -> None:
        self._barrier = None
        request = barrier.answer()
        self._answer_now(request.tag.owner, [request])
        if barrier.behind:
            self._lend_others(barrier.behind, None)
            self._kick()
