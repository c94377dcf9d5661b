"""The control socket: JSON lines over a Unix socket that only root (or the service's own user) may use.

Must not know what a verb does.

One request, one line: ``{"verb": "status"}``; one answer, one line: ``{"data": …}`` or ``{"error": sentence}``.
Everything that a client can make this hold is bounded: clients, the length of a line, the time that it may idle.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Any

from xenbackend.errors import ConfigError
from xenbackend.log import get_logger
from xenbackend.protocol.client import DEFAULT_SOCKET

Reply = Callable[[dict[str, Any]], None]
Handler = Callable[[dict[str, Any], Reply], None]

MAX_CLIENTS = 256  # a hotplug script of each disk that is just being attached
MAX_LINE = 64 * 1024  # bytes of a request
IDLE_S = 30.0
ANSWER_S = 90.0  # the longest that an answer may take: a worker has 60 s to open its chain
OWN_DIRECTORY = Path(DEFAULT_SOCKET).parent
_UCRED = Struct("iii")  # pid, uid, gid: unix(7), SO_PEERCRED


class Server:
    """Listens, reads requests, writes answers. `handler` gets each request and a function for its one answer."""

    def __init__(
        self,
        path: str,
        selector: selectors.BaseSelector,
        handler: Handler,
        now: Callable[[], float],
        inherited: int = -1,
    ) -> None:
        """Listen at `path`; `inherited` is a descriptor that a former service listened on there.

        Raises: ConfigError, where another service listens already or the socket cannot be made.
        """
        self._path = Path(path)
        self._selector = selector
        self._handler = handler
        self._now = now
        self._log = get_logger("server")
        self._clients: dict[_Client, None] = {}
        self._socket = _take_over(self._path, inherited) or _listen(self._path)
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def next_deadline(self) -> float | None:
        """Return when `turn` has to be called at the latest."""
        return min((client.deadline for client in self._clients), default=None)

    def turn(self) -> None:
        """Send clients away that have idled for too long."""
        now = self._now()
        for client in [client for client in self._clients if now >= client.deadline]:
            self._drop(client)

    def fileno(self) -> int:
        """Return the descriptor on which the next service may go on listening."""
        return self._socket.fileno()

    def close(self, *, leaves: bool = False) -> None:
        """Send everybody away and stop listening; with `leaves` the next service listens on, and clients wait."""
        for client in list(self._clients):
            with suppress(OSError):  # the last answer is that of who ended us
                client.write()
            self._drop(client)
        self._selector.unregister(self._socket)
        self._socket.close()
        if not leaves:
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):
            near, _ = self._socket.accept()
            if len(self._clients) >= MAX_CLIENTS or not _may_use(near):
                near.close()
                return
            client = _Client(near, self._now() + IDLE_S)
            self._clients[client] = None
            self._selector.register(near, selectors.EVENT_READ, lambda: self._serve(client))

    def _serve(self, client: _Client) -> None:
        """Read or write what is possible now."""
        try:
            is_open = client.write() if client.outgoing else client.read()
        except BlockingIOError:
            return
        except OSError:
            is_open = False
        if not is_open:
            self._drop(client)
            return
        self._next(client)

    def _next(self, client: _Client) -> None:
        """Hand over the next request once the last one is answered, and wait for what is due."""
        client.deadline = self._now() + IDLE_S
        line = client.take_line()
        if line is not None:
            client.is_waiting, client.deadline = True, self._now() + ANSWER_S
            self._handle(client, line)
        if client in self._clients:
            wanted = selectors.EVENT_WRITE if client.outgoing else selectors.EVENT_READ
            self._selector.modify(client.socket, wanted, lambda: self._serve(client))

    def _handle(self, client: _Client, line: bytes) -> None:
        def reply(answer: dict[str, Any]) -> None:
            if client in self._clients:
                client.is_waiting = False
                client.outgoing = json.dumps(answer).encode() + b"\n"
                self._selector.modify(client.socket, selectors.EVENT_WRITE, lambda: self._serve(client))

        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            reply({"error": "the request is not a JSON object in one line"})
            return
        try:
            self._handler(request, reply)
        except Exception as bug:  # one odd request must not end the service of every disk
            self._log.exception("a request could not be answered", verb=str(request.get("verb")))
            reply({"error": f"the service could not answer, see its log: {type(bug).__name__}: {bug}"})

    def _drop(self, client: _Client) -> None:
        del self._clients[client]
        self._selector.unregister(client.socket)
        client.socket.close()


class _Client:
    """One connection: at most one request being handled, at most one line more in the buffer."""

    def __init__(self, near: socket.socket, deadline: float) -> None:
        near.setblocking(False)
        self.socket = near
        self.deadline = deadline
        self.outgoing = b""
        self.is_waiting = False  # for the answer to its request
        self._incoming = bytearray()

    def read(self) -> bool:
        """Take in what came; False when the client has gone or sends more than a line may hold."""
        data = self.socket.recv(MAX_LINE)
        self._incoming += data
        return bool(data) and len(self._incoming) <= MAX_LINE

    def write(self) -> bool:
        """Send what can be sent."""
        self.outgoing = self.outgoing[self.socket.send(self.outgoing) :]
        return True

    def take_line(self) -> bytes | None:
        """Return the next request, None while there is none or the last is not answered yet."""
        if self.is_waiting or self.outgoing or b"\n" not in self._incoming:
            return None
        line, _, rest = bytes(self._incoming).partition(b"\n")
        self._incoming[:] = rest
        return line


def check_place(path: str, inherited: int = -1) -> None:
    """See that a service can listen at `path`, where a former one may have left a socket that does.

    Raises: ConfigError.
    """
    if inherited >= 0:
        with socket.socket(fileno=os.dup(inherited)) as near:
            if _is_reached(near, Path(path)):
                return
    with _listen(Path(path)):
        Path(path).unlink()


def check_free(path: str) -> None:
    """Make our own directory where it is missing, and raise ConfigError when there is anything but an unused socket."""
    if Path(path).parent == OWN_DIRECTORY:  # systemd makes it for the unit; whoever starts us by hand need not
        with suppress(OSError):
            OWN_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno is None:  # what Python itself refuses: a path that fits into no address
                raise ConfigError(f"{path}: cannot listen there: {error}") from None
            if Path(path).exists() and not Path(path).is_socket():
                raise ConfigError(f"{path}: cannot listen there: it is no socket") from None
            return
    raise ConfigError(f"{path}: another xenbackend service listens there already")


def _take_over(path: Path, inherited: int) -> socket.socket | None:
    """Return the inherited socket if it can still be reached at `path`: whoever has connected meanwhile is served."""
    if inherited < 0:
        return None
    near = socket.socket(fileno=inherited)
    if _is_reached(near, path):
        near.setblocking(False)
        return near
    near.close()
    return None


def _is_reached(near: socket.socket, path: Path) -> bool:
    return near.getsockname() == str(path) and path.is_socket()


def _listen(path: Path) -> socket.socket:
    check_free(str(path))
    near = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    former = os.umask(0o177)  # the socket is born with mode 0600
    try:
        path.unlink(missing_ok=True)
        near.bind(str(path))
    except OSError as error:
        near.close()
        hint = f"; make the directory {path.parent}" if error.errno == errno.ENOENT else ""
        raise ConfigError(f"{path}: cannot listen: {error.strerror or error}{hint}") from None
    finally:
        os.umask(former)
    near.listen(MAX_CLIENTS)
    return near


def _may_use(near: socket.socket) -> bool:
    _, uid, _ = _UCRED.unpack(near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return uid in (0, os.geteuid())
