"""The xenstore client: synchronous calls with a deadline, watch events as a bounded set. The only importer of pyxs.

Must not interpret a key, and must not run a thread.

It uses the lower half of pyxs: packets, operation numbers and the packet connection. The upper half is not used because
of two faults of pyxs 0.4.1: a call in flight while xenstored goes away never returns, and `Monitor.wait` can spin for
ever on an event of a watch that was removed meanwhile.

A connection is either in step or lost. Anything that breaks it (end of file, a deadline, a reply to no request of ours)
closes it and raises StoreError. Every later call raises at once until `reconnect`.
"""

from __future__ import annotations

import errno as errno_module
import os
import random
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar

from pyxs._internal import Op, Packet
from pyxs.connection import PacketConnection
from pyxs.exceptions import ConnectionError as PacketError

from xenbackend.errors import StoreError
from xenbackend.supervisor.xenstore import nodes
from xenbackend.supervisor.xenstore.nodes import Nodes, Request

T = TypeVar("T")

_ANSWER_MAX = 1 << 20  # bytes; over a socket oxenstored sends a long directory in one piece, beyond the header's limit
_NUMBERS = dict(zip(Op._fields, Op, strict=True)) | {"DIRECTORY_PART": 22}  # io/xs_wire.h; the last one is not in pyxs
_HEADER = struct.Struct("=IIII")  # io/xs_wire.h, "struct xsd_sockmsg": type, req_id, tx_id, len

TIMEOUT_S = 10.0
ATTEMPTS = 20  # of a transaction: with the pauses, about a second in all
_PAUSE_S = 0.001  # longest pause before the second attempt; doubled each time, up to _PAUSE_MAX_S
_PAUSE_MAX_S = 0.1
_AT_ONCE = 16  # requests sent before the first answer is read: so many of any size fit into a socket
_EVENTS_PER_CALL = 1024  # packets read by one `events`, so that a flood cannot hold the caller
_PATHS_PER_TOKEN = 64  # distinct changed paths kept per token; if there are more, the watched paths stand for all


def find_address() -> str:
    """Return where xenstore answers on this machine: a daemon's socket, else the kernel's device.

    Source: libxenstore honours XENSTORED_PATH and XENSTORED_RUNDIR in the same order.
    Raises: StoreError when there is none.
    """
    asked = os.environ.get("XENSTORED_PATH")
    if asked:
        return asked
    rundirs = (os.environ.get("XENSTORED_RUNDIR", "/run/xenstored"), "/var/run/xenstored")
    for candidate in (*(f"{each}/socket" for each in rundirs), "/dev/xen/xenbus"):
        if os.path.exists(candidate):  # noqa: PTH110 - a question, not a path to keep
            return candidate
    raise StoreError("no xenstore here: neither /run/xenstored/socket nor /dev/xen/xenbus exists; is this a Xen host?")


class _Transport:
    """A descriptor that pyxs sends through and we read from, with a deadline instead of waiting for ever.

    It tries first and polls only then, because the kernel's xenbus device never reports that it can be written.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.deadline = 0.0  # time.monotonic()

    def fileno(self) -> int:
        return self._fd

    def send(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def recv(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = os.read(self._fd, size - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not piece:
                raise OSError(errno_module.ECONNRESET, "xenstored closed the connection")
            data += piece
        return data

    def is_readable(self) -> bool:
        return self._poll(select.POLLIN, 0)

    def close(self) -> None:
        os.close(self._fd)

    def _wait(self, what: int) -> None:
        remaining_s = self.deadline - time.monotonic()
        if remaining_s <= 0 or not self._poll(what, remaining_s):
            raise OSError(errno_module.ETIMEDOUT, "xenstored did not answer in time")

    def _poll(self, what: int, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, what)
        return bool(poll.poll(timeout_s * 1000))


class _Connection(PacketConnection):  # type: ignore[misc]  # pyxs has no types
    """pyxs's packet connection on our transport. pyxs's own transport has no timeout, and leaks a refused socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.at_once = _AT_ONCE
        self.poll: select.epoll | None = None  # readable if the connection is; None until `Store.fileno` is called

    def connect(self) -> None:
        super().connect()
        self.be_shown()

    def be_shown(self) -> None:
        if self.poll is not None and self.is_connected:
            self.poll.register(self.fileno(), select.EPOLLIN)

    def close(self, silent: bool = True) -> None:  # noqa: FBT001, FBT002 - pyxs's signature; pyxs calls it, too
        if self.poll is not None and self.is_connected:
            self.poll.unregister(self.fileno())
        super().close(silent)

    def create_transport(self) -> _Transport:
        if not stat.S_ISSOCK(os.stat(self.path).st_mode):  # noqa: PTH116 - pyxs keeps a plain string
            self.at_once = 1  # Linux (xenbus_xs.c) sends a payload later, from the buffer that the next write fills
            return _Transport(os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as near:
            near.connect(self.path)
            return _Transport(near.detach())


class Transaction(Nodes):
    """The nodes as one transaction sees them, made by `Store.transact`."""


class Store(Nodes):
    """One connection to xenstore, for one thread. The constructor connects.

    Before you sleep on `fileno`, call `events` until `has_events` is False: events also arrive while a call waits for
    its reply. The cost of an event does not grow with the number of watches.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = TIMEOUT_S, pause: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(partial(self._exchange, 0), partial(self._exchange_many, 0))
        self.address = address or find_address()
        self.why_lost = ""  # why the connection was lost the last time
        self._timeout_s = timeout_s
        self._pause = pause
        self._connection = _Connection(self.address)
        self._request = 0
        self.counts: dict[str, int] = {}  # events that came, by a watch's token; its reader clears it
        self._watches: dict[str, dict[str, None]] = {}  # paths by token
        self._muted: set[str] = set()  # tokens
        self._events: dict[str, dict[str, None]] = {}  # changed paths by token, in order of arrival
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """True until the connection is lost or closed."""
        return bool(self._connection.is_connected)

    @property
    def has_events(self) -> bool:
        """True while `events` would return something without reading from the connection."""
        return bool(self._events)

    def fileno(self) -> int:
        """Return a descriptor that is readable when events may have come or the connection is lost.

        It stays the same after `reconnect`, and is never readable while there is no connection.
        """
        if self._connection.poll is None:
            self._connection.poll = select.epoll()
            self._connection.be_shown()
        return int(self._connection.poll.fileno())

    def close(self) -> None:
        """Close everything; xenstored drops our watches and transactions."""
        self.disconnect()
        poll, self._connection.poll = self._connection.poll, None
        if poll is not None:
            poll.close()

    def disconnect(self) -> None:
        """Close the connection until `reconnect`."""
        self._connection.close()

    def reconnect(self) -> None:
        """Connect anew and set all watches again. As always in xenstore, each fires at once, so re-read everything.

        Raises: StoreError; the watches are remembered for the next try, but for those that xenstored has refused.
        """
        self.disconnect()
        self._events.clear()
        self._open()
        self._of_each("WATCH", [token for token in self._watches if token not in self._muted])

    def own_domid(self) -> int:
        """Return the number of the domain that we run in."""
        text = self.read("domid")
        if not (text.isascii() and text.isdigit()):
            raise StoreError(f"xenstore: the node domid of our own domain holds {text!r}, which is not a domain number")
        return int(text)

    def watch(self, path: str, token: str) -> None:
        """Ask for an event (path, token) at once, and whenever the node or one below it changes or is removed."""
        paths = self._watches.setdefault(token, {})
        if path in paths:
            return
        paths[path] = None  # before asking: the first event may precede the reply
        if token in self._muted:
            return
        try:
            self._ask("WATCH", (path, token), b"")
        except StoreError:
            self._forget_watch(path, token)
            raise

    def unwatch(self, path: str, token: str) -> None:
        """Remove a watch; no event of it is reported any more. Removing a watch that was never set is no error."""
        if path not in self._watches.get(token, ()):
            return
        self._forget_watch(path, token)
        if token not in self._watches:
            self._events.pop(token, None)
        with suppress(StoreError):  # a lost connection or a muted token has no watches
            self._ask("UNWATCH", (path, token), b"")

    def mute(self, *tokens: str) -> None:
        """Remove the watches with these tokens until `unmute`."""
        loud = [each for each in tokens if each in self._watches and each not in self._muted]
        self._muted.update(loud)
        self._of_each("UNWATCH", loud)

    def unmute(self, *tokens: str) -> None:
        """Set the watches with these tokens again; each fires at once.

        Raises: StoreError. If the connection is lost, `reconnect` sets them; one that xenstored refuses is forgotten.
        """
        muted = [each for each in tokens if each in self._muted]
        self._muted.difference_update(muted)
        self._of_each("WATCH", muted)

    def events(self) -> list[tuple[str, str]]:
        """Return what changed since the last call as (path, token), each pair once, without blocking.

        The memory that this takes is bounded by the number of watches: if too many paths of one token have changed, the
        watched paths stand for anything below them. Raises: StoreError when the connection is lost.
        """
        transport = self._transport()
        for _ in range(_EVENTS_PER_CALL):
            if not transport.is_readable():
                break
            transport.deadline = time.monotonic() + self._timeout_s
            packet = self._receive()
            if packet.op != Op.WATCH_EVENT:
                raise self._lost("a reply came that was not asked for")
            self._note(packet.payload)
        found = [(path, token) for token, paths in self._events.items() for path in paths]
        self._events.clear()
        return found

    def transact(self, body: Callable[[Transaction], T], attempts: int = ATTEMPTS) -> T:
        """Call `body` in a transaction and commit it. Begin again while others interfere (EAGAIN).

        An exception in `body` aborts the transaction. Raises: StoreError, with EAGAIN after the last attempt.
        """
        for attempt in range(attempts):
            try:
                return self._transact_once(body)
            except StoreError as error:
                if error.errno != errno_module.EAGAIN or attempt == attempts - 1:
                    raise
            # Jitter, so that two clients that collided do not collide again.
            self._pause(random.uniform(0, min(_PAUSE_MAX_S, _PAUSE_S * 2**attempt)))
        raise ValueError("transact needs at least one attempt")

    def _transact_once(self, body: Callable[[Transaction], T]) -> T:
        number = int(self._ask("TRANSACTION_START", ("",), b"").rstrip(b"\0"))
        ask = partial(self._exchange, number)
        try:
            result = body(Transaction(ask, partial(self._exchange_many, number)))
        except BaseException:
            with suppress(StoreError):  # the reason for the abort is what counts
                ask("TRANSACTION_END", ("F",), b"")
            raise
        ask("TRANSACTION_END", ("T",), b"")
        return result

    def _open(self) -> None:
        try:
            self._connection.connect()
        except OSError as error:
            raise StoreError(f"xenstore at {self.address}: cannot connect: {error.strerror}") from None

    def _of_each(self, operation: str, tokens: Sequence[str]) -> None:
        watches = [(path, token) for token in tokens for path in self._watches[token]]
        requests = [(path, nodes.encode(token) + b"\0") for path, token in watches]
        answers = zip(self._exchange_many(0, operation, requests), watches, strict=True)
        refused = [(answer, watch) for answer, watch in answers if isinstance(answer, StoreError)]
        if operation == "WATCH":
            for _, watch in refused:
                self._forget_watch(*watch)
        for problem, _ in refused:
            raise problem

    def _forget_watch(self, path: str, token: str) -> None:
        del self._watches[token][path]
        if not self._watches[token]:
            del self._watches[token]
            self.counts.pop(token, None)
            self._muted.discard(token)

    def _exchange(self, transaction: int, operation: str, strings: Sequence[str], tail: bytes) -> bytes:
        """Send one request and return the payload of its reply. Events that come in between are noted."""
        what = f"xenstore: {operation.lower().replace('_', ' ')} {strings[0]}"
        payload = nodes.payload(what, strings, tail)
        return self._take_reply(operation, self._send(transaction, operation, payload), what)

    def _exchange_many(self, transaction: int, operation: str, requests: Sequence[Request]) -> list[bytes | StoreError]:
        """Send requests of one operation, and return the payload or the error of each.

        Many are sent before the first answer is awaited, since waiting takes most of the time. Raises: StoreError when
        the connection is lost.
        """
        answers: list[bytes | StoreError] = []
        for first in range(0, len(requests), self._connection.at_once):
            part = requests[first : first + self._connection.at_once]
            whats = [f"xenstore: {operation.lower()} {path}" for path, _ in part]
            payloads = [nodes.payload(what, (path,), tail) for what, (path, tail) in zip(whats, part, strict=True)]
            numbers = [self._send(transaction, operation, payload) for payload in payloads]
            for number, what in zip(numbers, whats, strict=True):
                try:
                    answers.append(self._take_reply(operation, number, what))
                except StoreError as error:
                    if not self.is_connected:
                        raise
                    answers.append(error)
        return answers

    def _send(self, transaction: int, operation: str, payload: bytes) -> int:
        """Send a request, and return its number."""
        self._transport().deadline = time.monotonic() + self._timeout_s
        self._request = (self._request + 1) & 0xFFFFFFFF
        try:
            # Packet(...) would refuse operations that are newer than pyxs.
            packet = Packet._make((_NUMBERS[operation], self._request, transaction, len(payload), payload))
            self._connection.send(packet)
        except PacketError as error:
            raise self._lost(getattr(error.__context__, "strerror", None) or str(error)) from None
        return self._request

    def _take_reply(self, operation: str, number: int, what: str) -> bytes:
        while (packet := self._receive()).op == Op.WATCH_EVENT:
            self._note(packet.payload)
        if packet.rq_id != number or packet.op not in (_NUMBERS[operation], Op.ERROR):
            raise self._lost("a reply came that was not asked for")
        if packet.op == Op.ERROR:
            raise nodes.error_of(what, packet.payload)
        return bytes(packet.payload)

    def _receive(self) -> Any:
        transport = self._transport()
        try:
            op, request, transaction, size = _HEADER.unpack(transport.recv(_HEADER.size))
            if size > _ANSWER_MAX:
                raise self._lost(f"it announced a payload of {size} bytes")
            return Packet._make((op, request, transaction, size, transport.recv(size)))
        except OSError as error:
            raise self._lost(str(error.strerror)) from None

    def _note(self, payload: bytes) -> None:
        """Remember an event once; ignore it if its watch is gone."""
        path, token, *_ = (*nodes.strings(payload), "", "")
        watched = self._watches.get(token)
        if watched and token not in self._muted:
            self.counts[token] = self.counts.get(token, 0) + 1
            paths = self._events.setdefault(token, {})
            paths[path] = None
            if len(paths) > _PATHS_PER_TOKEN + len(watched):
                self._events[token] = dict.fromkeys(watched)

    def _transport(self) -> _Transport:
        transport: _Transport | None = self._connection.transport
        if transport is None:
            raise StoreError(f"xenstore at {self.address}: not connected")
        return transport

    def _lost(self, reason: str) -> StoreError:
        self.disconnect()
        self.why_lost = f"xenstore at {self.address}: connection lost: {reason}"
        return StoreError(self.why_lost)
