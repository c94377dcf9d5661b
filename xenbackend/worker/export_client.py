"""One client of an NBD export: its socket, what it asked for, and the answers on their way to it.

Must not call the chain, nor trust a client: it can make us hold no more than its `Lender` lends, and we read from it
again only once it has taken its answers.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from xenbackend.kernel.memory import allocate
from xenbackend.nbd.abi import CMD_DISC, CMD_READ, CMD_WRITE, REQUEST, Export, NbdError
from xenbackend.nbd.handshake import GREETING, Handshake, Phase
from xenbackend.nbd.transmission import Command, error_in, parse_command, reply

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor

HANDSHAKE_S = 10.0  # for a client to complete its handshake
STALL_S = 30.0  # for a client to go on with a write that it has begun, or with taking its answers
_CHUNK = 64 * 1024  # bytes received by one call
_PIECES = 64  # sent by one call


class Job:
    """One request of a client, from its head on the wire to its answer; it holds one of the lender's slots."""

    __slots__ = ("client", "command", "data", "left", "status")

    def __init__(self, client: Client, command: Command) -> None:
        self.client = client
        self.command = command
        self.left = 0  # requests into which the lender cut it and which have not come back
        self.status = 0  # the first of their errors
        has_data = command.kind in (CMD_READ, CMD_WRITE)
        self.data = allocate(command.length).view if has_data else memoryview(b"")


class Lender(Protocol):
    """What a client needs of its export."""

    def reserve(self, client: Client, length: int) -> bool:
        """Lend a slot and `length` bytes of memory; if False, `client.resume` is called when they may be free."""

    def release(self, length: int) -> None:
        """Take a slot and `length` bytes back."""

    def submit(self, jobs: list[Job]) -> None:
        """Carry out jobs; each of them ends with a call of `client.answer`."""

    def forget(self, client: Client, why: str) -> None:
        """Take note that a client has gone; `why`: a sentence if it was thrown out, else empty."""


class Client:
    """A connection, from the greeting until either side goes away."""

    def __init__(self, connection: socket.socket, export: Export, lender: Lender, reactor: Reactor) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._export = export
        self._lender = lender
        self._reactor = reactor
        self._handshake = Handshake(export)
        self._received = bytearray()  # bytes that are not parsed yet
        self._filling: Job | None = None  # a write whose data has not all arrived
        self._filled = 0
        self._refused: bytes | None = None  # the answer to a request whose data has to be skipped first
        self._to_skip = 0
        self._out: deque[tuple[memoryview, Job | None]] = deque()  # to send; a job's memory is released after its piece
        self._in_flight = 0
        self._is_sending = self._is_reading = self._is_closed = False
        self._takes_more = True
        self._writable: select.epoll | None = None  # while the client does not take its answers
        self._born = self._progress = reactor.now()
        self._read_on()
        self._put(memoryview(GREETING))

    def answer(self, job: Job, error: int) -> None:
        """Answer a job with the protocol's error number, 0 for success, and with the data of a successful read."""
        self._in_flight -= 1
        has_data = job.command.kind == CMD_READ and not error and not self._is_closed
        if not has_data:
            self._lender.release(len(job.data))
        self._put(memoryview(reply(error, job.command.cookie)))
        if has_data:
            self._put(job.data, job)

    def resume(self) -> None:
        """Read on after memory or a slot was missing, or after the answers have been taken."""
        if not self._is_closed and self._takes_more and not self._out:
            self._read_on()
            self._take()

    def finish(self) -> None:
        """Take nothing more, and hang up when all in flight is answered; drop a write that has not all arrived."""
        self._takes_more = False
        self._stop_reading()
        self._drop_partial()
        self._go_if_done()

    def check(self, now: float) -> None:
        """Throw the client out if it keeps us waiting."""
        if self._handshake.phase is not Phase.TRANSMISSION:
            if now - self._born > HANDSHAKE_S:
                self.close(f"it did not finish its handshake within {HANDSHAKE_S:.0f} s")
        elif (self._filling or self._refused or self._out) and now - self._progress > STALL_S:
            self.close(f"it made no progress for {STALL_S:.0f} s")

    def close(self, why: str = "") -> None:
        """Hang up at once, and drop the answers in flight; `why`: a sentence if the client is thrown out."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop_reading()
        self._stop_waiting()
        self._drop_partial()
        for _, job in self._out:
            if job is not None:
                self._lender.release(len(job.data))
        self._out.clear()
        self._socket.close()
        self._lender.forget(self, why)

    # Receiving ------------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            if self._filling is not None and not self._received:
                count = self._socket.recv_into(self._filling.data[self._filled :])
                self._filled += count
            else:
                data = self._socket.recv(_CHUNK)
                self._received += data
                count = len(data)
        except BlockingIOError:
            return
        except OSError:  # it is gone
            count = 0
        if not count:
            self.close()
            return
        self._progress = self._reactor.now()
        self._take()

    def _take(self) -> None:
        """Take everything that has arrived completely."""
        jobs: list[Job] = []
        try:
            if self._handshake.phase is not Phase.TRANSMISSION:
                self._put(memoryview(self._handshake.take(self._received)))
                self._takes_more = self._handshake.phase is not Phase.ENDED
            if self._handshake.phase is Phase.TRANSMISSION:
                while self._takes_more and self._take_one(jobs):
                    pass
        except NbdError as problem:
            self._lender.submit(jobs)
            self.close(f"it sent {problem}")
            return
        self._lender.submit(jobs)
        if not self._takes_more:
            self.finish()

    def _take_one(self, jobs: list[Job]) -> bool:
        """Take the next request, or data of one; False if more bytes, a slot or memory are needed. Raises: NbdError."""
        if self._filling is not None:
            return self._fill(self._filling, jobs)
        if self._refused is not None:
            return self._skip(self._refused)
        if len(self._received) < REQUEST.size:
            return False
        command = parse_command(self._received)
        error = error_in(command, self._export)
        if command.kind == CMD_DISC and not error:
            self._takes_more = False
            return False
        is_empty = not command.length and command.kind in (CMD_READ, CMD_WRITE)
        if error or is_empty:
            del self._received[: REQUEST.size]
            self._refused, self._to_skip = reply(error, command.cookie), command.payload
            return True
        if not self._lender.reserve(self, command.length if command.kind in (CMD_READ, CMD_WRITE) else 0):
            self._stop_reading()
            return False
        del self._received[: REQUEST.size]
        job = Job(self, command)
        self._in_flight += 1
        if command.payload:
            self._filling, self._filled = job, 0
        else:
            jobs.append(job)
        return True

    def _fill(self, job: Job, jobs: list[Job]) -> bool:
        end = min(job.command.length, self._filled + len(self._received))
        count = end - self._filled
        job.data[self._filled : end] = self._received[:count]
        del self._received[:count]
        self._filled = end
        if end < job.command.length:
            return False
        self._filling = None
        jobs.append(job)
        return True

    def _skip(self, answer: bytes) -> bool:
        count = min(self._to_skip, len(self._received))
        del self._received[:count]
        self._to_skip -= count
        if self._to_skip:
            return False
        self._refused = None
        self._put(memoryview(answer))
        return True

    def _drop_partial(self) -> None:
        job, self._filling = self._filling, None
        if job is not None:
            self._in_flight -= 1
            self._lender.release(len(job.data))

    def _read_on(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._reactor.add(self._socket.fileno(), self._receive)

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._reactor.remove(self._socket.fileno())

    # Sending --------------------------------------------------------------------------------------------------------

    def _put(self, piece: memoryview, job: Job | None = None) -> None:
        """Send a piece in the next pass of the loop, together with others that there are by then."""
        if self._is_closed or not len(piece):
            return
        self._out.append((piece, job))
        if not self._is_sending:
            self._is_sending = True
            self._reactor.call_soon(self._send)

    def _send(self) -> None:
        self._is_sending = False
        if self._is_closed:
            return
        try:
            while self._out:
                self._sent(os.writev(self._socket.fileno(), [piece for piece, _ in islice(self._out, _PIECES)]))
        except BlockingIOError:
            self._wait_until_writable()
            return
        except OSError:  # it is gone
            self.close()
            return
        if self._writable is not None:
            self._stop_waiting()
            self.resume()
        self._go_if_done()

    def _sent(self, count: int) -> None:
        self._progress = self._reactor.now()
        while count:
            piece, job = self._out.popleft()
            if count < len(piece):
                self._out.appendleft((piece[count:], job))
                return
            count -= len(piece)
            if job is not None:
                self._lender.release(len(job.data))

    def _wait_until_writable(self) -> None:
        """Have `_send` called when the socket has room: our own epoll becomes readable then, which the loop sees."""
        self._stop_reading()
        if self._writable is None:
            self._writable = select.epoll()
            self._writable.register(self._socket, select.EPOLLOUT)
            self._reactor.add(self._writable.fileno(), self._send)

    def _stop_waiting(self) -> None:
        if self._writable is not None:
            self._reactor.remove(self._writable.fileno())
            self._writable.close()
            self._writable = None

    def _go_if_done(self) -> None:
        if not self._takes_more and not self._in_flight and not self._out:
            self.close()
