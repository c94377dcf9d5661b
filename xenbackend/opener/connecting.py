"""Connects to servers: resolves names, connects sockets, and drains former connections before.

Must not speak any protocol, nor assume that a request without an answer was not done.

A server may still write what it received by a connection that nobody reads any more: that of a worker that has died, or
one that was lost. So the connection that takes its place must wait for its end. Our direction is shut down, and the
other one is read until the server ends it: a server that ends a connection only when it has done everything that came
by it has nothing under way then. For other servers the chain says how long they may still be at work (`drain=`): that
time is waited for, too.

A connection that does not end within DRAIN_S is `Undrained`: the server, or the network in between, may be stopped, and
may continue at any time. Draining goes on when the connection is next asked for. If the network itself has given the
connection up (ETIMEDOUT), its end will never be seen, and an administrator has to say that it is over. A connection
that is reset counts as ended, since only a host that has no such connection any more resets it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError
from xenbackend.opener.rules import Server
from xenbackend.protocol import jobs, opening

CONNECT_S = 5.0  # for each address of a server
DRAIN_S = 10.0  # for all former connections
_ROOM = 256 * 1024  # bytes read and discarded at once
_BUFFER = 1 << 20  # bytes that a socket buffers, if the host allows as many
_RESETS = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)

# Sends what was found, with its descriptors, lent for the call; returns a sentence if the worker may not have it.
Say = Callable[[opening.Found, Sequence[int]], str]


class End(Enum):
    """What became of a connection that was shut down."""

    ENDED = "it has ended"
    LASTS = "it has not ended in time"
    BROKEN = "the network has given up on it"


@dataclass(slots=True)
class _Former:
    socket: socket.socket
    is_broken: bool


class Connections:
    """The connections that came with a job, and those that are made for it."""

    def __init__(self, job: jobs.Job, fds: Sequence[int]) -> None:
        """Take the descriptors of `job.connections`, ours from now on."""
        self._vbd = job.vbd
        self._former = {
            (each.server, each.place): _Former(socket.socket(fileno=fd), each.is_broken)
            for each, fd in zip(job.connections, fds, strict=True)
        }

    def connect(self, question: opening.ConnectTo, server: Server, say: Say) -> int:
        """Return a connected socket, the caller's, once the connections that it replaces have ended.

        Raises: DriverError, with ETIMEDOUT if one of those does not end; OSError.
        """
        after, key = After(question.after), (question.server, question.place)
        if after is After.BREACH and key in self._former:
            self._former[key].is_broken = True
        if after is After.DEATH:
            self._drain(list(self._former), server.drain_s, say)
        elif after is not After.NOTHING:
            self._drain([each for each in self._former if each == key], server.drain_s, say)
        near = connect(server.endpoint)
        try:
            if question.keeps:
                found = opening.Connected(question.server, question.place, is_alone=after is After.DEATH)
                refusal = say(found, [near.fileno()])
                if refusal:
                    raise DriverError(refusal, errno=errno.EMFILE)
                replaced = self._former.pop(key, None)
                if replaced is not None:
                    replaced.socket.close()
                self._former[key] = _Former(near.dup(), is_broken=False)
            return near.detach()
        except BaseException:
            near.close()
            raise

    def close(self) -> None:
        """Close our copies of the sockets."""
        while self._former:
            self._former.popitem()[1].socket.close()

    def _drain(self, keys: list[tuple[str, int]], drain_s: float, say: Say) -> None:
        """Drain connections, and close them. Raises: DriverError, if one does not end."""
        until = time.monotonic() + DRAIN_S
        for key in keys:  # all of them, before waiting for any
            _shut_down(self._former[key].socket)
        for key in keys:
            former = self._former[key]
            end = End.BROKEN if former.is_broken else drain(former.socket, until)
            if end is not End.ENDED:
                former.is_broken = end is End.BROKEN
                say(opening.Undrained(*key, is_broken=former.is_broken), ())
                raise DriverError(_sentence(key[0], end), errno=errno.ETIMEDOUT)
        if keys and drain_s:
            time.sleep(drain_s)
        for key in keys:
            self._former.pop(key).socket.close()


def connect(endpoint: Endpoint) -> socket.socket:
    """Return a connected socket. Raises: DriverError, if the name is not known or nobody listens."""
    try:
        return _connect_unix(endpoint.path) if endpoint.path else _connect_tcp(endpoint)
    except socket.gaierror as error:
        problem = f"the server {endpoint} cannot be found: {error.strerror}"
        raise DriverError(problem, errno=errno.EHOSTUNREACH) from error
    except OSError as error:
        code = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EINVAL
        why = os.strerror(code) if error.errno or code == errno.ETIMEDOUT else str(error)
        raise DriverError(f"the server {endpoint} cannot be reached: {why}", errno=code) from error


def drain(former: socket.socket, until: float) -> End:
    """Read a connection, whose sending side is shut down, to its end or `until` (time.monotonic)."""
    room = bytearray(_ROOM)
    while True:
        remaining_s = until - time.monotonic()
        former.settimeout(max(0.001, remaining_s))
        try:
            if not former.recv_into(room):
                return End.ENDED
            if remaining_s <= 0:  # it may send for ever
                return End.LASTS
        except TimeoutError as error:  # our own timeout has no errno; the network's has
            return End.BROKEN if error.errno else End.LASTS
        except OSError as error:
            return End.ENDED if error.errno in _RESETS else End.BROKEN


def _shut_down(former: socket.socket) -> None:
    try:
        former.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno not in _RESETS:
            raise


def _connect_unix(path: str) -> socket.socket:
    near = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    return _connected(near, path)


def _connect_tcp(endpoint: Endpoint) -> socket.socket:
    failure = OSError(errno.EHOSTUNREACH, "it has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM):
        try:
            near = socket.socket(family, kind, protocol)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _connected(near, address)
        except OSError as error:
            failure = error
    raise failure


def _connected(near: socket.socket, address: object) -> socket.socket:
    try:
        for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            near.setsockopt(socket.SOL_SOCKET, side, _BUFFER)
        near.settimeout(CONNECT_S)
        near.connect(address)  # type: ignore[arg-type]  # of its family
        near.settimeout(None)
    except BaseException:
        near.close()
        raise
    return near


def _sentence(server: str, end: End) -> str:
    if end is End.LASTS:
        return (
            f"the server {server} has not ended a former connection, and may still carry out writes that came by it; "
            "the disk waits until the connection has ended; if you are certain that nothing is under way there, "
            "`xenbackend resume` continues"
        )
    return (
        f"the connection to the server {server} broke off without a proper end, and the server may still carry out "
        "writes that came by it; once you are certain that nothing is under way there, `xenbackend resume` continues"
    )
