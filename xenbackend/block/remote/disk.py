"""A disk on an NBD server in service: one connection, made anew when it is lost; requests cut where they must be.

Must not decide what becomes of requests that could not be done (the disk's policy does), nor send one again itself.

When its connection is lost, everything that is in flight goes back as AWAY, and comes again from above. What was sent
may be under way at the server all the same. So a new connection is asked for by `Env.reconnect`, which sees the former
one to its end before, and until then everything that comes is AWAY, too.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from xenbackend.block.driver import Complete, Env
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.remote.connection import Connection, Lost, cut
from xenbackend.block.remote.negotiation import Negotiation
from xenbackend.block.request import AWAY, PENDING, Op, Request
from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError
from xenbackend.nbd.abi import SEND_FLUSH, SEND_FUA, SEND_READ_ONLY, SEND_TRIM, STATUS_ZERO, NbdError
from xenbackend.nbd.client import Offer

TICK_S = 1.0  # between two looks at whether the server says anything
PAUSES_S = (0.1, 0.3, 1.0, 2.0, 5.0)  # before a connection is tried again, by how often in a row
_MOST = 1 << 30  # bytes of one discard or question for block status
_ABILITIES = {SEND_FLUSH: "flush", SEND_TRIM: "discard", SEND_FUA: "write through its cache"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the chain says: which export of which server, how long it may be silent, and how writes are done."""

    endpoint: Endpoint
    export: str
    silence_s: float
    durable: bool


@dataclass(slots=True)
class _Whole:
    """A request that was cut into parts."""

    request: Request
    left: int
    status: int = 0


class RemoteDisk:
    """One export in service; `complete` gets requests back, `offer` is what was told to the guest."""

    def __init__(self, env: Env, wanted: Wanted, near: socket.socket, offer: Offer, complete: Complete) -> None:
        """The socket, after its handshake, is ours from now on."""
        self.offer = offer
        self._env = env
        self._wanted = wanted
        self._complete = complete
        self._most = (min(offer.max_block, _MOST), min(offer.max_block, _MOST), _MOST, _MOST)  # bytes, by Op
        can = {Op.FLUSH: SEND_FLUSH, Op.DISCARD: SEND_TRIM}
        self._never = {op for op, flag in can.items() if not offer.flags & flag}
        self._parts: dict[Request, _Whole] = {}
        self._connection: Connection | None = None
        self._negotiation: Negotiation | None = None
        self._coming: socket.socket | None = None  # whose handshake is under way
        self._failures = 0  # of connecting, in a row
        self._is_closed = self._is_timed = self._wants_to_send = False
        self._heard = -1
        self._silent_s = 0.0
        self._begin(near, offer)

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does."""
        connection = self._connection
        if connection is None:
            for request in batch:
                request.status = AWAY
            self._complete(batch)
            return
        if self._never and not (batch := self._without_what_never_happens(batch)):
            return
        most = self._most
        for request in batch:
            if request.length > most[request.op]:
                batch = self._cut(batch)
                break
        connection.submit(batch)
        if connection.wants_to_send != self._wants_to_send:
            self._want(connection)
        if connection.failure is not None:  # not from within `submit`
            self._env.call_later(0.0, partial(self._lose, connection))
        if not self._is_timed:
            self._is_timed, self._heard, self._silent_s = True, connection.heard, 0.0
            self._env.call_later(TICK_S, self._tick)

    def extents(self, size: int) -> Iterator[Extent]:
        """Yield what is data and what reads as zeros; a range within a sector counts as data. Raises: DriverError."""
        connection = self._connection
        step = max(512, self.offer.min_block)
        if connection is None or self.offer.context is None:
            yield Extent(0, size, Kind.DATA, 0)
            return
        place = done = 0  # up to which the server has told, and we
        is_zero = False
        while place < size:
            try:
                found = list(connection.block_status(place, min(size - place, _MOST), self._wanted.silence_s))
            except (Lost, NbdError, OSError) as problem:
                raise DriverError(f"the server does not tell what is data: {problem}") from problem
            for length, flags in found:
                if not length:
                    raise DriverError("the server tells of a range without bytes")
                end = min(place + length, size)
                if bool(flags & STATUS_ZERO) != is_zero:
                    # where zeros begin, up; where data begin, down: what is not whole is data
                    edge = min(size, place + -place % step if flags & STATUS_ZERO else place - place % step)
                    if edge > done:
                        yield Extent(done, edge - done, Kind.ZERO if is_zero else Kind.DATA, done)
                        done = edge
                    is_zero = bool(flags & STATUS_ZERO)
                place = end
                if place >= size:
                    break
        if done < size:
            yield Extent(done, size - done, Kind.ZERO if is_zero else Kind.DATA, done)

    def close(self) -> None:
        """Say goodbye, with nothing in flight; a connection that is being made is given up."""
        self._is_closed = True
        if self._negotiation is not None:
            self._negotiation.stop()
        if self._coming is not None:
            self._coming.close()
            self._coming = None
            self._env.disconnected(self._wanted.endpoint)
        connection, self._connection = self._connection, None
        if connection is not None:
            self._env.unwatch(connection.fileno())
            is_clean = not connection.in_flight and connection.failure is None
            connection.close(in_order=is_clean)
            if is_clean:
                self._env.disconnected(self._wanted.endpoint)

    def _begin(self, near: socket.socket, offer: Offer) -> None:
        self._connection = connection = Connection(near, offer, durable=self._wanted.durable)
        self._failures, self._wants_to_send, self._heard = 0, False, -1
        self._env.watch(connection.fileno(), self._ready)
        self._env.report("connection", f"to {self._wanted.endpoint}")

    def _want(self, connection: Connection) -> None:
        self._wants_to_send = connection.wants_to_send
        self._env.want(connection.fileno(), writable=self._wants_to_send)

    def _ready(self) -> None:
        connection = self._connection
        if connection is None:
            return
        if self._wants_to_send:
            connection.send()
            if not connection.wants_to_send:
                self._want(connection)
        done = connection.receive()
        if done:
            self._give_back(done)
        if connection.failure is not None:
            self._lose(connection)

    def _give_back(self, done: list[Request]) -> None:
        if self._parts:
            done = [whole for request in done if (whole := self._joined(request)) is not None]
        if done:
            self._complete(done)

    def _tick(self) -> None:
        """Look whether a server that owes us answers says anything; one that owes none may be silent for ever."""
        self._is_timed = False
        connection = self._connection
        if connection is None or not connection.in_flight:
            return
        self._is_timed = True
        self._env.call_later(TICK_S, self._tick)
        if connection.heard != self._heard:
            self._heard, self._silent_s = connection.heard, 0.0
            return
        self._silent_s += TICK_S
        if self._silent_s >= self._wanted.silence_s:
            self._is_timed = False
            connection.failure = Lost(f"the server has answered nothing for {self._silent_s:.0f} s")
            self._lose(connection)

    def _lose(self, connection: Connection) -> None:
        """Give back what is in flight, and have another connection made in the place of one that has failed."""
        if connection is not self._connection:
            return
        self._connection = None
        failure = connection.failure
        self._env.unwatch(connection.fileno())
        lost = connection.take_back()
        connection.close(in_order=False)
        self._env.report("connection", f"lost: {failure}")
        is_broken = isinstance(failure, Lost) and failure.is_broken
        self._reconnect(After.BREACH if is_broken else After.LOSS)
        for request in lost:
            request.status = AWAY
        if lost:
            self._give_back(lost)

    def _reconnect(self, after: After) -> None:
        if not self._is_closed:
            self._env.reconnect(self._wanted.endpoint, 0, after, self._connected)

    def _try_later(self, why: str) -> None:
        """Say why there is no connection, and try again after a pause."""
        self._env.report("connection", f"none: {why}")
        pause_s = PAUSES_S[min(self._failures, len(PAUSES_S) - 1)]
        self._failures += 1
        self._env.call_later(pause_s, partial(self._reconnect, After.LOSS))

    def _connected(self, near: socket.socket | None, why: DriverError | None) -> None:
        if near is None:
            if not self._is_closed:
                self._try_later(why.problem if why is not None else "it could not be made")
        elif self._is_closed:
            near.close()
            self._env.disconnected(self._wanted.endpoint)
        else:
            self._coming = near
            self._negotiation = Negotiation(self._env, near, self._wanted.export, self._negotiated)

    def _negotiated(self, offer: Offer | None, why: str) -> None:
        near, self._coming, self._negotiation = self._coming, None, None
        if near is None:
            return
        if offer is not None:
            why = self._is_less(offer)
        if offer is None or why:
            near.close()
            self._env.disconnected(self._wanted.endpoint)  # no request went there
            self._try_later(why)
        else:
            self._begin(near, offer)

    def _is_less(self, offer: Offer) -> str:
        """Return why a guest that was told of one offer cannot go on with another one; empty: it can."""
        known = self.offer
        if offer.size < known.size:
            return f"the export has {offer.size} bytes now, and the guest's disk {known.size}: it cannot shrink in use"
        if offer.flags & SEND_READ_ONLY and not known.flags & SEND_READ_ONLY:
            return "the export can only be read now"
        if offer.min_block > max(512, known.min_block) or offer.max_block < self._most[Op.READ]:
            return "the export wants other sizes of requests now"
        missing = [name for flag, name in _ABILITIES.items() if known.flags & flag and not offer.flags & flag]
        return f"the export cannot {missing[0]} any more, as the guest was told it could" if missing else ""

    def _without_what_never_happens(self, batch: list[Request]) -> list[Request]:
        """Give back what the server cannot do (D6), and return the rest."""
        never = [request for request in batch if request.op in self._never]
        for request in never:
            request.status = errno.EOPNOTSUPP
        if never:
            self._complete(never)
        return [request for request in batch if request.op not in self._never]

    def _cut(self, batch: list[Request]) -> list[Request]:
        """Return a batch with each request that is too long as its parts."""
        found = []
        for request in batch:
            most = self._most[request.op]
            if request.length <= most:
                found.append(request)
                continue
            whole = _Whole(request, 0)
            for start in range(0, request.length, most):
                part = Request()
                part.op, part.offset, part.status = request.op, request.offset + start, PENDING
                part.length = min(most, request.length - start)
                if request.iov:
                    part.iov = cut(request.iov, start, part.length)
                self._parts[part] = whole
                whole.left += 1
                found.append(part)
        return found

    def _joined(self, request: Request) -> Request | None:
        """Return the request that is done by this one: itself, or the one that its last part makes whole."""
        whole = self._parts.pop(request, None)
        if whole is None:
            return request
        whole.left -= 1
        whole.status = whole.status or request.status
        if whole.left:
            return None
        whole.request.status = whole.status
        return whole.request
