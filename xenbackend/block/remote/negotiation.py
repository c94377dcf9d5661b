"""A connection's handshake: in one go while a chain is being opened, or step by step in the loop of a served disk.

Must not connect, nor judge whether a server's offer will do. If TLS is wanted, nothing is sent without it but the
request for TLS.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from xenbackend.block.driver import Env
from xenbackend.block.remote.deadline import Deadline
from xenbackend.block.remote.tls import Tls, TlsFailed, TlsSocket
from xenbackend.errors import DriverError
from xenbackend.nbd.abi import NbdError
from xenbackend.nbd.client import ClientHandshake, Offer, Refused

HANDSHAKE_S = 10.0  # for the whole handshake; while a chain is being opened, for those of all its connections
_ROOM = 4096  # bytes received at once

Stream = socket.socket | TlsSocket
Then = Callable[[Offer | None, str], None]  # gets the server's offer, or why there is none
_FAILURES = (NbdError, Refused, TlsFailed, OSError)


class Talk:
    """The handshake on one socket; the caller waits until there is something to receive.

    stream   the socket, or the TLS socket over it, for the requests afterwards
    """

    def __init__(self, near: socket.socket, export: str, tls: Tls | None) -> None:
        """The socket remains the caller's, who has to close it."""
        self.stream: Stream = near
        self._near = near
        self._tls = tls
        self._handshake = ClientHandshake(export, tls=tls is not None)
        self._received = bytearray()
        self._is_encrypting = False  # TLS's own handshake is under way

    def step(self) -> Offer | None:
        """Receive once, and reply; return the server's offer at the end of the handshake, else None.

        Raises: OSError of the socket; NbdError, Refused, TlsFailed.
        """
        if not self._is_encrypting:
            piece = self.stream.recv(_ROOM)
            if not piece:
                raise ConnectionAbortedError
            self._received += piece
            self.stream.sendall(self._handshake.take(self._received))
            if not self._handshake.wants_tls or self._tls is None:
                return self._handshake.offer
            self._is_encrypting = True
            self.stream = self._tls.over(self._near)
        assert isinstance(self.stream, TlsSocket)  # noqa: S101 - just made
        self.stream.handshake()
        self._is_encrypting = False
        self.stream.sendall(self._handshake.tls_established())
        return None


def negotiate(near: socket.socket, export: str, tls: Tls | None, deadline: Deadline) -> tuple[Stream, Offer]:
    """Do the handshake, waiting for the server; return the non-blocking stream for requests, and the offer.

    Raises: DriverError; the socket stays open.
    """
    talk = Talk(near, export, tls)
    near.setblocking(False)
    try:
        while (offer := deadline.do(near, talk.step)) is None:
            pass
    except _FAILURES as problem:
        raise _explained(problem) from problem
    return talk.stream, offer


class Negotiation:
    """A handshake in the worker's loop; `then` is called once, unless it is stopped before."""

    def __init__(self, env: Env, near: socket.socket, export: str, tls: Tls | None, then: Then) -> None:
        """The socket remains the caller's, who has to close it."""
        self._env = env
        self._socket = near
        self._talk = Talk(near, export, tls)
        self._then: Then | None = then
        near.setblocking(False)
        env.watch(near.fileno(), self._ready)
        env.call_later(HANDSHAKE_S, self._overdue)

    @property
    def stream(self) -> Stream:
        """The stream for requests, when `then` is called."""
        return self._talk.stream

    def stop(self) -> None:
        """Abandon the handshake."""
        if self._then is not None:
            self._then = None
            self._env.unwatch(self._socket.fileno())

    def _ready(self) -> None:
        if self._then is None:
            return
        try:
            while (offer := self._talk.step()) is None:
                pass  # TLS may have more already
            self._end(offer, "")
        except BlockingIOError:
            pass
        except _FAILURES as problem:
            self._end(None, _explained(problem).problem)

    def _overdue(self) -> None:
        self._end(None, _explained(TimeoutError()).problem)

    def _end(self, offer: Offer | None, why: str) -> None:
        then = self._then
        if then is not None:
            self.stop()
            then(offer, why)


def _explained(problem: Exception) -> DriverError:
    """Return why a handshake failed, as a sentence."""
    match problem:
        case Refused():
            return DriverError(f"the server refuses: {problem}", errno=errno.ENOENT)
        case TlsFailed():
            return DriverError(f"there is no TLS with the server: {problem}", errno=errno.EPROTO)
        case NbdError():
            return DriverError(f"the server does not speak NBD: {problem}", errno=errno.EPROTO)
        case TimeoutError():
            return DriverError(f"the server has not done the handshake for {HANDSHAKE_S:.0f} s", errno=errno.ETIMEDOUT)
        case ConnectionAbortedError():
            return DriverError("the server has closed the connection in the handshake", errno=errno.ECONNRESET)
    code = getattr(problem, "errno", 0) or errno.ECONNRESET
    return DriverError(f"the connection broke in the handshake: {os.strerror(code)}", errno=code)
