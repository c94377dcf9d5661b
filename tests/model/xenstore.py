"""The rig's xenstored in this process, and a `Store` that talks to it without a socket.

Must not know what an operation means. `tests/contract/test_store.py` checks that the store behaves like every other.

Packets sent before a reply are read before it, as on the wire; those between replies wait at a descriptor.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from xenbackend.rig.session import Registry, Session
from xenbackend.rig.tree import Tree
from xenbackend.supervisor.xenstore import store
from xenbackend.supervisor.xenstore.store import Store


class Xenstored:
    """A xenstored; `is_up`: it can be reached."""

    def __init__(self) -> None:
        self.registry = Registry(Tree())
        self.registry.introduce(0)
        self.is_up = True
        self.transports: list[Transport] = []

    def go_down(self) -> None:
        """Close all connections, and accept none until `come_up`; the nodes stay."""
        self.is_up = False
        for transport in list(self.transports):
            transport.hang_up()

    def come_up(self) -> None:
        """Accept connections again."""
        self.is_up = True

    def store(self, domid: int, before: Callable[[str], None] | None = None) -> LocalStore:
        """Connect as a domain. `before` is called before each operation. Raises: StoreError."""
        return LocalStore(self, domid, before)


class _Session(Session):
    """A session that rings a bell when it has something to send."""

    def __init__(self, registry: Registry, domid: int, bell: int) -> None:
        self._bell = bell
        super().__init__(registry, domid)

    def _send(self, op: int, request: int, transaction: int, payload: bytes) -> None:
        super()._send(op, request, transaction, payload)
        os.eventfd_write(self._bell, 1)


class Transport:
    """The store's transport: the other end of one session."""

    def __init__(self, server: Xenstored, domid: int) -> None:
        if not server.is_up:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        self.deadline = 0.0
        self._server = server
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._session: Session | None = _Session(server.registry, domid, self._bell)
        server.transports.append(self)

    def hang_up(self) -> None:
        """End the session, so that the client reads the end of the connection."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self._server.transports.remove(self)
            os.eventfd_write(self._bell, 1)

    def fileno(self) -> int:
        return self._bell

    def is_readable(self) -> bool:
        return self._session is None or bool(self._session.outgoing)

    def send(self, data: bytes) -> None:
        if self._session is None:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        self._session.feed(data)

    def recv(self, size: int) -> bytes:
        if self._session is None:
            raise OSError(errno.ECONNRESET, "xenstored closed the connection")
        outgoing = self._session.outgoing
        if len(outgoing) < size:
            raise OSError(errno.ETIMEDOUT, "xenstored did not answer in time")
        data = bytes(outgoing[:size])
        del outgoing[:size]
        if data and not outgoing:
            os.eventfd_read(self._bell)
        return data

    def close(self) -> None:
        self.hang_up()
        os.close(self._bell)


class _Connection(store._Connection):
    """The store's connection to a xenstored of the model."""

    def __init__(self, server: Xenstored, domid: int) -> None:
        super().__init__(f"domain {domid}")
        self._server = server
        self._domid = domid

    def create_transport(self) -> Any:
        return Transport(self._server, self._domid)


class LocalStore(Store):
    """`Store` on such a connection."""

    def __init__(self, server: Xenstored, domid: int, before: Callable[[str], None] | None = None) -> None:
        self._server = server
        self._domid = domid
        self._before = before
        super().__init__(f"domain {domid}", pause=lambda _: None)

    def _open(self) -> None:
        if not isinstance(self._connection, _Connection):
            self._connection = _Connection(self._server, self._domid)
        super()._open()

    def _exchange(self, transaction: int, operation: str, strings: Any, tail: bytes) -> bytes:
        if self._before is not None:
            self._before(operation)
        return super()._exchange(transaction, operation, strings, tail)
