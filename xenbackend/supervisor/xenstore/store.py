"""The xenstore client: synchronous calls with a deadline, watch events as a bounded set. The only importer of pyxs.

Must not interpret a key, and must not run a thread.

It stands on the lower half of pyxs: packets, operation numbers and the packet connection. The upper half is left alone
for two faults of pyxs 0.4.1: a call in flight while xenstored goes away never returns, and `Monitor.wait` can spin for
ever on an event of a watch that was removed meanwhile.

A connection is either in step or lost. Whatever breaks it (end of file, a deadline, a reply that is not ours) closes
it and raises StoreError, and every later call raises at once until `reconnect`.
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
from xenbackend.supervisor.xenstore.nodes import Nodes

T = TypeVar("T")

XENSTORE_PAYLOAD_MAX = 4096  # io/xs_wire.h
_ANSWER_MAX = 1 << 20  # over a socket oxenstored answers a long directory in one piece, whatever the header says
_NUMBERS = dict(zip(Op._fields, Op, strict=True)) | {"DIRECTORY_PART": 22}  # io/xs_wire.h; the last one is not in pyxs
_HEADER = struct.Struct("=IIII")  # io/xs_wire.h, "struct xsd_sockmsg": type, req_id, tx_id, len

TIMEOUT_S = 10.0
ATTEMPTS = 20  # of a transaction; with the pauses about a second in all
_PAUSE_S = 0.001  # before the second attempt at most; doubled up to the next line
_PAUSE_MAX_S = 0.1
_EVENTS_PER_CALL = 1024  # packets read by one `events`, so that a flood cannot hold the caller
_PATHS_PER_TOKEN = 64  # distinct changed paths kept per token; more are said as "something below the watch"


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

    It tries first and polls afterwards, because the kernel's xenbus device never reports that it can be written.
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
    """pyxs's packet connection on our transport: its own cannot time out and leak a refused socket."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create_transport(self) -> _Transport:
        if not stat.S_ISSOCK(os.stat(self.path).st_mode):  # noqa: PTH116 - pyxs keeps a plain string
            return _Transport(os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as near:
            near.connect(self.path)
            return _Transport(near.detach())


class Transaction(Nodes):
    """The nodes as one transaction sees them; `Store.transact` makes it."""


class Store(Nodes):
    """One connection to xenstore, for one thread. The constructor connects.

    Before sleeping on `fileno`, call `events` until it returns nothing: events also arrive while a call waits for its
    reply.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = TIMEOUT_S, pause: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(partial(self._exchange, 0))
        self.address = address or find_address()
        self.why_lost = ""  # the connection, the last time
        self._timeout_s = timeout_s
        self._pause = pause
        self._connection = _Connection(self.address)
        self._request = 0
        self._watches: dict[tuple[str, str], None] = {}
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

    def fileno(self) -> int:
        """Return a descriptor that is readable when events may have come or the connection is lost; -1 without one."""
        return int(self._connection.fileno()) if self.is_connected else -1

    def close(self) -> None:
        """Close the connection; xenstored drops its watches and transactions."""
        self._connection.close()

    def reconnect(self) -> None:
        """Connect anew and set all watches again. Each of them fires at once, as xenstore does, so re-read everything.

        Raises: StoreError, and the watches are still remembered for the next try.
        """
        self.close()
        self._events.clear()
        self._open()
        for path, token in self._watches:
            self._ask("WATCH", (path, token), b"")

    def own_domid(self) -> int:
        """Return the number of the domain that we run in."""
        text = self.read("domid")
        if not (text.isascii() and text.isdigit()):
            raise StoreError(f"xenstore: the node domid of our own domain holds {text!r}, which is no domain number")
        return int(text)

    def watch(self, path: str, token: str) -> None:
        """Ask for an event (path, token) at once and whenever the node or one below it changes or goes away."""
        if (path, token) in self._watches:
            return
        self._watches[path, token] = None  # before asking: the first event may precede the reply
        try:
            self._ask("WATCH", (path, token), b"")
        except StoreError:
            del self._watches[path, token]
            raise

    def unwatch(self, path: str, token: str) -> None:
        """Take a watch back; no event of it is reported any more. A watch that was never set is fine."""
        if (path, token) not in self._watches:
            return
        del self._watches[path, token]
        if not any(each == token for _, each in self._watches):
            self._events.pop(token, None)
        with suppress(StoreError):  # lost connections have no watches either
            self._ask("UNWATCH", (path, token), b"")

    def events(self) -> list[tuple[str, str]]:
        """Return what changed since the last call as (path, token), each pair once, without blocking.

        The memory for it is bounded by the number of watches: beyond a limit of paths per token, the watched paths
        themselves stand for "anything below". Raises: StoreError when the connection is lost.
        """
        transport = self._transport()
        for _ in range(_EVENTS_PER_CALL):
            if not transport.is_readable():
                break
            transport.deadline = time.monotonic() + self._timeout_s
            packet = self._receive()
            if packet.op != Op.WATCH_EVENT:
                raise self._lost("a reply came that nobody asked for")
            self._note(packet.payload)
        found = [(path, token) for token, paths in self._events.items() for path in paths]
        self._events.clear()
        return found

    def transact(self, body: Callable[[Transaction], T], attempts: int = ATTEMPTS) -> T:
        """Call `body` in a transaction and commit it, again from the start while others interfere (EAGAIN).

        What `body` raises aborts the transaction. Raises: StoreError, with EAGAIN after the last attempt.
        """
        for attempt in range(attempts):
            try:
                return self._transact_once(body)
            except StoreError as error:
                if error.errno != errno_module.EAGAIN or attempt == attempts - 1:
                    raise
            # Jitter, so that two who collided do not collide again.
            self._pause(random.uniform(0, min(_PAUSE_MAX_S, _PAUSE_S * 2**attempt)))
        raise ValueError("transact needs at least one attempt")

    def _transact_once(self, body: Callable[[Transaction], T]) -> T:
        number = int(self._ask("TRANSACTION_START", ("",), b"").rstrip(b"\0"))
        ask = partial(self._exchange, number)
        try:
            result = body(Transaction(ask))
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

    def _exchange(self, transaction: int, operation: str, strings: Sequence[str], tail: bytes) -> bytes:
        """Send one request and return the payload of its reply, noting the events that come in between."""
        what = f"xenstore: {operation.lower().replace('_', ' ')} {strings[0]}"
        payload = _payload(what, strings, tail)
        op = _NUMBERS[operation]
        transport = self._transport()
        transport.deadline = time.monotonic() + self._timeout_s
        self._request = (self._request + 1) & 0xFFFFFFFF
        try:
            # Packet(...) would refuse operations that are younger than pyxs.
            self._connection.send(Packet._make((op, self._request, transaction, len(payload), payload)))
        except PacketError as error:
            raise self._lost(getattr(error.__context__, "strerror", None) or str(error)) from None
        while (packet := self._receive()).op == Op.WATCH_EVENT:
            self._note(packet.payload)
        if packet.rq_id != self._request or packet.op not in (op, Op.ERROR):
            raise self._lost("a reply came that nobody asked for")
        if packet.op == Op.ERROR:
            name = packet.payload.rstrip(b"\0").decode("ascii", "replace")
            number = getattr(errno_module, name, errno_module.EIO)
            raise StoreError(f"{what}: {os.strerror(number)}", number)
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
        """Remember an event, once; drop it when its watch is gone."""
        path, token, *_ = (*nodes.strings(payload), "", "")
        watched = [each for each, name in self._watches if name == token]
        if watched:
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
        self.close()
        self.why_lost = f"xenstore at {self.address}: connection lost: {reason}"
        return StoreError(self.why_lost)


def _payload(what: str, strings: Sequence[str], tail: bytes) -> bytes:
    """Return NUL-terminated strings and a raw tail as one payload. Raises: StoreError when the wire cannot carry it."""
    if any("\0" in each for each in strings):
        raise StoreError(f"{what!r}: a path, token or permission must not hold NUL", errno_module.EINVAL)
    payload = b"".join(nodes.encode(each) + b"\0" for each in strings) + tail
    if len(payload) > XENSTORE_PAYLOAD_MAX:
        raise StoreError(
            f"{what}: {len(payload)} bytes of path and value; xenstore carries at most {XENSTORE_PAYLOAD_MAX}",
            errno_module.E2BIG,
        )
    return payload
