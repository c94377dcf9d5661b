"""One of a disk's connections to its NBD server: replaced when it is lost, watched while the server owes an answer.

Must not decide what happens to requests that failed, nor send one again.

When the connection is lost, everything in flight on it ends with AWAY, but may still be under way at the server. So a
new connection is requested by `Env.reconnect`, which drains the old one first.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from xenbackend.block.driver import Complete, Env
from xenbackend.block.remote.connection import Connection, Stream
from xenbackend.block.remote.lost import Lost
from xenbackend.block.remote.negotiation import Negotiation
from xenbackend.block.remote.tls import Tls
from xenbackend.block.request import AWAY, Request
from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError
from xenbackend.nbd.client import Offer

TICK_S = 1.0  # between two checks whether the server answers
_LEAST = 4096  # received bytes that count as an answer: a link that brings fewer in `silence_s` cannot serve a disk
PAUSES_S = (0.1, 0.3, 1.0, 2.0, 5.0)  # before the next try to connect, by the number of failures in a row


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the chain wants: which export of which server, how long that may be silent, how writes are done, TLS."""

    endpoint: Endpoint
    export: str
    silence_s: float
    durable: bool
    tls: Tls | None = None


class Lane:
    """The connection in one place. `connection` is None while there is none, and `trouble` says why."""

    def __init__(
        self,
        env: Env,
        wanted: Wanted,
        place: int,
        complete: Complete,
        why_unsuitable: Callable[[Offer], str],
        on_change: Callable[[], None],
    ) -> None:
        """`complete` gets finished requests; `why_unsuitable` returns why an offer will not do. Call `begin` next."""
        self.connection: Connection | None = None
        self.trouble = ""
        self._env = env
        self._wanted = wanted
        self._place = place
        self._complete = complete
        self._why_unsuitable = why_unsuitable
        self._on_change = on_change
        self._negotiation: Negotiation | None = None
        self._coming: socket.socket | None = None  # a new connection during its handshake
        self._failures = 0  # to connect, in a row
        self._is_closed = self._is_timed = self._wants_to_send = False
        self._answered = self._heard = -1
        self._silent_s = 0.0

    def begin(self, stream: Stream, offer: Offer) -> None:
        """Take over a connection after its handshake."""
        self.connection = connection = Connection(stream, offer, durable=self._wanted.durable)
        self.trouble = ""
        self._failures, self._wants_to_send, self._answered = 0, False, -1
        self._env.watch(connection.fileno(), self._ready)
        self._on_change()

    def submit(self, connection: Connection, batch: list[Request]) -> None:
        """Send requests by `connection`, which is the present `self.connection`."""
        connection.submit(batch)
        if connection.wants_to_send != self._wants_to_send:
            self._want(connection)
        if connection.failure is not None:  # deferred: requests must not be given back within `submit`
            self._env.call_later(0.0, partial(self._lose, connection))
        if not self._is_timed:
            self._is_timed = True
            self._note_heard(connection)
            self._env.call_later(TICK_S, self._tick)

    def close(self) -> None:
        """Close the connection in order; nothing is in flight. One that is being made is given up."""
        self._is_closed = True
        if self._negotiation is not None:
            self._negotiation.stop()
        if self._coming is not None:
            self._coming.close()
            self._coming = None
            self._parted()
        connection, self.connection = self.connection, None
        if connection is not None:
            self._env.unwatch(connection.fileno())
            is_clean = not connection.in_flight and connection.failure is None
            connection.close(in_order=is_clean)
            if is_clean:
                self._parted()

    def _parted(self) -> None:
        self._env.disconnected(self._wanted.endpoint, self._place)

    def _want(self, connection: Connection) -> None:
        self._wants_to_send = connection.wants_to_send
        self._env.want(connection.fileno(), writable=self._wants_to_send)

    def _ready(self) -> None:
        connection = self.connection
        if connection is None:
            return
        if self._wants_to_send:
            connection.send()
            if not connection.wants_to_send:
                self._want(connection)
        done = connection.receive()
        if done:
            self._complete(done)
        if connection.failure is not None:
            self._lose(connection)

    def _tick(self) -> None:
        """Check that a server that owes us answers sends enough; one that owes none may be silent for ever.

        Counting any byte would not do: a server that sends one now and then would never be given up.
        """
        self._is_timed = False
        connection = self.connection
        if connection is None or not connection.in_flight:
            return
        if connection.answered != self._answered or connection.heard - self._heard >= _LEAST:
            self._note_heard(connection)
        else:
            self._silent_s += TICK_S
        if self._silent_s >= self._wanted.silence_s:
            connection.fail(Lost(f"the server has not answered anything for {self._silent_s:.0f} s"))
            self._lose(connection)  # without another tick: there would be two when the next connection starts its own
        else:
            self._is_timed = True
            self._env.call_later(TICK_S, self._tick)

    def _note_heard(self, connection: Connection) -> None:
        self._answered, self._heard, self._silent_s = connection.answered, connection.heard, 0.0

    def _lose(self, connection: Connection) -> None:
        """Give up a connection that has failed: request another one, and give back what is in flight."""
        if connection is not self.connection:
            return
        self.connection = None
        failure = connection.failure
        self._env.unwatch(connection.fileno())
        lost = connection.take_back()
        connection.close(in_order=False)
        self._say(f"lost: {failure}")
        is_broken = isinstance(failure, Lost) and failure.is_broken
        self._reconnect(After.BREACH if is_broken else After.LOSS)
        for request in lost:
            request.status = AWAY
        if lost:
            self._complete(lost)

    def _say(self, trouble: str) -> None:
        self.trouble = trouble
        self._on_change()

    def _reconnect(self, after: After) -> None:
        if not self._is_closed:
            self._env.reconnect(self._wanted.endpoint, self._place, after, self._connected)

    def _try_later(self, why: str) -> None:
        """Report why there is no connection, and try again after a pause."""
        self._say(f"none: {why}")
        pause_s = PAUSES_S[min(self._failures, len(PAUSES_S) - 1)]
        self._failures += 1
        self._env.call_later(pause_s, partial(self._reconnect, After.LOSS))

    def _connected(self, near: socket.socket | None, why: DriverError | None) -> None:
        if near is None:
            if not self._is_closed:
                self._try_later(why.problem if why is not None else "it could not be made")
        elif self._is_closed:
            near.close()
            self._parted()
        else:
            self._coming = near
            wanted = self._wanted
            self._negotiation = Negotiation(self._env, near, wanted.export, wanted.tls, self._negotiated)

    def _negotiated(self, offer: Offer | None, why: str) -> None:
        near, negotiation = self._coming, self._negotiation
        self._coming = self._negotiation = None
        if near is None or negotiation is None:
            return
        if offer is not None:
            why = self._why_unsuitable(offer)
        if offer is None or why:
            near.close()
            self._parted()  # no request was sent by it
            self._try_later(why)
        else:
            self.begin(negotiation.stream, offer)
