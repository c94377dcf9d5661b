"""A connection's handshake: at once, while a chain is opened, or step by step in the loop, while a disk is served.

Must not connect, nor judge whether what a server offers will do.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from xenbackend.block.driver import Env
from xenbackend.errors import DriverError
from xenbackend.nbd.abi import NbdError
from xenbackend.nbd.client import ClientHandshake, Offer, Refused

HANDSHAKE_S = 10.0  # that a server may take for all of it
_ROOM = 4096  # bytes at once

Then = Callable[[Offer | None, str], None]  # what is offered, or why nothing is


def negotiate(near: socket.socket, export: str) -> Offer:
    """Do the handshake, blocking. Raises: DriverError; the socket stays the caller's."""
    handshake, received = ClientHandshake(export), bytearray()
    near.settimeout(HANDSHAKE_S)
    try:
        while handshake.offer is None:
            piece = near.recv(_ROOM)
            if not piece:
                raise DriverError("the server has closed the connection in the handshake", errno=errno.ECONNRESET)
            received += piece
            near.sendall(handshake.take(received))
    except Refused as problem:
        raise DriverError(f"the server refuses: {problem}", errno=errno.ENOENT) from problem
    except NbdError as problem:
        raise DriverError(f"the server does not speak NBD: {problem}", errno=errno.EPROTO) from problem
    except TimeoutError as problem:
        sentence = f"the server has not done the handshake for {HANDSHAKE_S:.0f} s"
        raise DriverError(sentence, errno=errno.ETIMEDOUT) from problem
    except OSError as problem:
        code = problem.errno or errno.ECONNRESET
        raise DriverError(f"the connection broke in the handshake: {problem.strerror}", errno=code) from problem
    return handshake.offer


class Negotiation:
    """One that goes on in the loop; `then` is called once, unless it is stopped before."""

    def __init__(self, env: Env, near: socket.socket, export: str, then: Then) -> None:
        """The socket stays the caller's."""
        self._env = env
        self._socket = near
        self._handshake = ClientHandshake(export)
        self._received = bytearray()
        self._then: Then | None = then
        near.setblocking(False)
        env.watch(near.fileno(), self._ready)
        env.call_later(HANDSHAKE_S, self._overdue)

    def stop(self) -> None:
        """Leave it."""
        if self._then is not None:
            self._then = None
            self._env.unwatch(self._socket.fileno())

    def _ready(self) -> None:
        if self._then is None:
            return
        try:
            piece = self._socket.recv(_ROOM)
            if not piece:
                self._end(None, "the server has closed the connection in the handshake")
                return
            self._received += piece
            answer = self._handshake.take(self._received)
            if answer and self._socket.send(answer) < len(answer):  # some hundred bytes, and nothing is before them
                self._end(None, "the server takes nothing")
            elif self._handshake.offer is not None:
                self._end(self._handshake.offer, "")
        except BlockingIOError:
            pass
        except Refused as problem:
            self._end(None, f"the server refuses: {problem}")
        except NbdError as problem:
            self._end(None, f"the server does not speak NBD: {problem}")
        except OSError as problem:
            self._end(None, f"the connection broke in the handshake: {problem.strerror}")

    def _overdue(self) -> None:
        self._end(None, f"the server has not done the handshake for {HANDSHAKE_S:.0f} s")

    def _end(self, offer: Offer | None, why: str) -> None:
        then = self._then
        if then is not None:
            self.stop()
            then(offer, why)
