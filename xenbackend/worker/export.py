"""A disk exported by NBD on a Unix socket, for a device model to boot from while no ring is connected.

Must not exist together with a connection: a chain has one user (D10). The export uses the chain from its creation until
`close` calls back; then none of its requests is in flight.

    device model ── socket ── Client ── Job ── Requests ── chain
                              bytes     memory  of `LARGEST` bytes at most

A client may be hostile: it can use up the slots and the memory of this disk's export until it is thrown out, and
nothing else.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbackend.block.chain import Chain
from xenbackend.block.driver import Geometry
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.nbd.abi import CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, MAX_BLOCK
from xenbackend.nbd.abi import Export as Offer
from xenbackend.nbd.transmission import error_of
from xenbackend.worker.channel import Reports
from xenbackend.worker.export_client import Client, Job

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor

MAX_CLIENTS = 8
SLOTS = 64  # requests in flight, of all clients together
MEMORY = MAX_BLOCK  # bytes of data in flight, of all clients together: one request of the greatest size
LARGEST = 1 << 20  # bytes of one read or write in the chain: as a ring's largest, so that layers get no larger one
_TICK_S = 1.0  # between two looks for clients that keep us waiting
_LAST_ANSWERS_S = 1.0  # for clients to take their last answers when the export ends
_OPS = {CMD_READ: Op.READ, CMD_WRITE: Op.WRITE, CMD_FLUSH: Op.FLUSH, CMD_TRIM: Op.DISCARD}


class Export:
    """Serves one chain to the clients of one socket."""

    def __init__(
        self,
        listener: socket.socket,
        path: str,
        chain: Chain,
        reactor: Reactor,
        kick: Callable[[], object],
        channel: Reports,
        on_bug: Callable[[Exception], None],
    ) -> None:
        """Accept clients from now on.

        Args:
            listener: the socket, ours from now on.
            path: of the socket, for people; its creator removes it.
            chain: open, and used by nobody else.
            reactor: the worker's loop.
            kick: starts I/O that was queued below the chain.
            channel: gets complaints about clients, and what an administrator must read.
            on_bug: gets an exception that a layer raised (D8).
        """
        self.path = path
        self.had_bugs = False
        self._listener = listener
        listener.setblocking(False)
        self._offer = _offer(chain.geometry)
        self._chain = chain
        self._reactor = reactor
        self._kick = kick
        self._channel = channel
        self._on_bug = on_bug
        self._clients: set[Client] = set()
        self._free = [Request() for _ in range(SLOTS)]
        self._slots, self._memory = SLOTS, MEMORY
        self._is_ticking = False
        self._waiting: deque[Client] = deque()  # for a slot or memory; the first one is next
        self._in_flight = 0  # requests lent to the chain
        self._written: list[Request] = []  # that must be durable before they are answered
        self._has_lost_writes = False  # a flush failed: none may succeed after it
        self._then: Callable[[], None] | None = None  # once nothing is left
        chain.contain = self._contain
        chain.complete = self._complete
        reactor.add(self._listener.fileno(), self._accept)

    def close(self, then: Callable[[], None]) -> None:
        """Take nothing more, answer what is in flight, hang up, then call `then` from the loop."""
        self._then = then
        self._reactor.remove(self._listener.fileno())
        self._listener.close()
        for client in list(self._clients):
            client.finish()
        self._chain.release()
        self._reactor.call_later(_LAST_ANSWERS_S, self._hang_up)
        self._end_if_done()

    # What clients ask for -------------------------------------------------------------------------------------------

    def reserve(self, client: Client, length: int) -> bool:
        """See `Lender.reserve`. The client that has waited longest comes first."""
        is_first = not self._waiting or self._waiting[0] is client
        if not is_first or not self._slots or self._memory < length:
            if client not in self._waiting:
                self._waiting.append(client)
            return False
        self._slots -= 1
        self._memory -= length
        if self._waiting:
            self._waiting.popleft()
            self._wake_next()
        return True

    def release(self, length: int) -> None:
        """Take back what was reserved."""
        self._slots += 1
        self._memory += length
        self._wake_next()

    def submit(self, jobs: list[Job]) -> None:
        """Hand jobs to the chain as one batch."""
        if not jobs:
            return
        batch: list[Request] = []
        for job in jobs:
            batch += self._requests_of(job)
        self._lend(batch)

    def forget(self, client: Client, why: str) -> None:
        """Forget a client that has gone; `why`: a sentence if it was thrown out, else empty."""
        if why:
            self._channel.complain(f"a client of the NBD export was disconnected: {why}")
        self._clients.discard(client)
        if client in self._waiting:
            self._waiting.remove(client)
            self._wake_next()
        self._end_if_done()

    def _requests_of(self, job: Job) -> list[Request]:
        """Return the requests that a job is cut into; `job.left` counts them."""
        command, op = job.command, _OPS[job.command.kind]
        offset, length = (0, 0) if op == Op.FLUSH else (command.offset, command.length)
        step = LARGEST if len(job.data) else max(1, length)
        requests = []
        for start in range(0, max(1, length), step):
            request = self._free.pop() if self._free else Request()
            request.op, request.offset, request.length = op, offset + start, min(step, length - start)
            request.iov = (job.data[start : start + step],) if len(job.data) else ()
            request.tag = job
            requests.append(request)
        job.left = len(requests)
        return requests

    # The chain's top ------------------------------------------------------------------------------------------------

    def _lend(self, batch: list[Request]) -> None:
        self._in_flight += len(batch)
        for request in batch:
            request.status = PENDING
        try:
            self._chain.submit(batch[:])  # a copy: the list belongs to the layers from now on
            self._kick()
        except Exception as bug:  # D8
            self._contain(bug, batch)

    def _complete(self, batch: list[Request]) -> None:
        for request in batch:
            job = request.tag
            if job is None:  # a bug ended it before
                continue
            self._in_flight -= 1
            if request.op == Op.FLUSH:
                self._note_flush(request)
            job.left -= 1
            job.status = job.status or request.status
            must_flush = job.command.must_be_durable and request.op != Op.FLUSH
            if not job.left and must_flush and not job.status:
                self._flush_later(request)
            else:
                request.tag, request.iov = None, ()
                self._free.append(request)
                self._answer_if_done(job)
        self._end_if_done()

    def _answer_if_done(self, job: Job) -> None:
        if not job.left:
            job.client.answer(job, error_of(job.status))

    def _flush_later(self, request: Request) -> None:
        """Flush behind a write that must be durable, from the loop: nothing is submitted out of `complete` (D5)."""
        request.tag.left = 1
        self._in_flight += 1  # still: an export that ends waits for it
        self._written.append(request)
        if len(self._written) == 1:
            self._reactor.call_soon(self._flush_written)

    def _flush_written(self) -> None:
        batch, self._written = self._written, []
        self._in_flight -= len(batch)
        for request in batch:
            request.op, request.offset, request.length, request.iov = Op.FLUSH, 0, 0, ()
        self._lend(batch)

    def _note_flush(self, request: Request) -> None:
        """Let no flush succeed after one that failed: the kernel reports lost data only once."""
        if request.status not in (0, errno.EOPNOTSUPP) and not self._has_lost_writes:
            self._has_lost_writes = True
            why = os.strerror(request.status)
            self._channel.alarm(f"a flush of the NBD export failed: {why}; from now on every flush fails")
        if self._has_lost_writes:
            request.status = errno.EIO

    def _contain(self, bug: Exception, given: list[Request]) -> None:
        """End with EIO the jobs whose requests a layer held when it raised an exception (D8); it may keep those."""
        self.had_bugs = True
        self._on_bug(bug)
        for request in given:
            job = request.tag
            if isinstance(job, Job):  # else it came back before, or is a layer's own
                request.tag = None
                self._in_flight -= 1
                self._free.append(Request())
                job.left -= 1
                job.status = errno.EIO
                self._answer_if_done(job)
        self._end_if_done()

    # Clients that come and go ---------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if len(self._clients) >= MAX_CLIENTS:
            connection.close()
            self._channel.complain(f"a client of the NBD export was refused: there are {MAX_CLIENTS} already")
            return
        self._clients.add(Client(connection, self._offer, self, self._reactor))
        if not self._is_ticking:
            self._is_ticking = True
            self._reactor.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        now = self._reactor.now()
        for client in list(self._clients):
            client.check(now)
        self._is_ticking = bool(self._clients)
        if self._is_ticking:
            self._reactor.call_later(_TICK_S, self._tick)

    def _wake_next(self) -> None:
        if self._waiting:
            self._reactor.call_soon(self._waiting[0].resume)

    def _hang_up(self) -> None:
        for client in list(self._clients):
            client.close()

    def _end_if_done(self) -> None:
        if self._then is not None and not self._clients and not self._in_flight:
            then, self._then = self._then, None
            self._reactor.call_soon(then)


def _offer(geometry: Geometry) -> Offer:
    return Offer(
        size=geometry.size,
        preferred_block=max(4096, geometry.physical_sector_size),
        read_only=geometry.read_only,
        can_flush=geometry.can_flush,
        can_trim=geometry.can_discard,
    )
