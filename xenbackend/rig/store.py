"""A small xenstored for machines without Xen, with the real wire format on Unix sockets: its sockets and its thread.

Must not know what an operation means (`rig/session.py`) or keep nodes (`rig/tree.py`).

    with Xenstored("/run/rig/store") as xenstored:          domain 0 connects to /run/rig/store
        socket = xenstored.add_domain_socket(5)             domain 5 to /run/rig/store.5

A client that connects to a domain's socket is taken to be that domain; with a real Xen, the ring page identifies it.
Everything runs on one thread, to which calls from other threads are passed. The observer runs there, too, and must not
block.

As a program: ``python -m xenbackend.rig.store SOCKET [DOMID ...]``, until SIGINT or SIGTERM.
"""

from __future__ import annotations

import selectors
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from xenbackend.rig.session import Observer, Registry, Session
from xenbackend.rig.tree import Quota, Tree, walk

T = TypeVar("T")

_UNREAD_MAX = 4 << 20  # bytes kept for a client that does not read; with more it is disconnected


class _Client:
    """A connection, with its session and its buffers."""

    def __init__(self, near: socket.socket, session: Session) -> None:
        self.near = near
        self.session = session


class Xenstored:
    """A xenstored that listens at `address` for domain 0, and at `address`.N for each domain N that was added.

    `observer(path, value)` is called after each change, with None for a removal.
    """

    def __init__(self, address: str | Path, *, observer: Observer | None = None, quota: Quota | None = None) -> None:
        self.address = str(address)
        self._observer = observer
        self._quota = quota
        self._registry = self._new_registry()
        self._thread: threading.Thread | None = None
        self._calls: deque[Callable[[], None]] = deque()
        self._listeners: dict[int, socket.socket] = {}
        self._clients: list[_Client] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and serve the existing nodes. Raises: OSError if a socket cannot be created."""
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, self._run_calls)
        for domid in self._registry.domains:
            self._listen(domid)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="xenstored", daemon=True)
        self._thread.start()

    def stop(self, *, forget: bool = False) -> None:
        """Close all connections and stop; `forget` also drops nodes and domains, as a restart of xenstored does."""
        if self._thread is not None:
            thread = self._thread
            self._on_thread(self._close_all)
            thread.join()
            self._thread = None
        if forget:
            self._registry = self._new_registry()

    def add_domain_socket(self, domid: int) -> str:
        """Create a domain (its directory with `domid`, @introduceDomain), and return the path of its socket."""
        self._on_thread(partial(self._add_domain, domid))
        return self._socket_path(domid)

    def release_domain(self, domid: int) -> None:
        """End a domain: close its socket and connections, fire @releaseDomain. The toolstack removes its nodes."""
        self._on_thread(partial(self._release_domain, domid))

    def dump(self, path: str = "/") -> list[tuple[str, str]]:
        """Return (path, value) of a node and all below, parents first; empty if the node does not exist."""
        return self._on_thread(partial(self._dump, path))

    def _new_registry(self) -> Registry:
        registry = Registry(Tree(quota=self._quota), self._observer)
        registry.introduce(0)
        return registry

    def _socket_path(self, domid: int) -> str:
        return f"{self.address}.{domid}" if domid else self.address

    def _dump(self, path: str) -> list[tuple[str, str]]:
        node = self._registry.tree.find(path)
        nodes = walk(path, node) if node is not None else ()
        return [(place, each.value.decode("utf-8", "backslashreplace")) for place, each in nodes]

    def _add_domain(self, domid: int) -> None:
        self._registry.introduce(domid)
        if self._thread is not None and domid not in self._listeners:
            self._listen(domid)

    def _release_domain(self, domid: int) -> None:
        self._registry.release(domid)
        if domid in self._listeners:
            self._close_listener(domid)
        for client in [each for each in self._clients if each.session.domid == domid]:
            self._hang_up(client)

    def _listen(self, domid: int) -> None:
        Path(self._socket_path(domid)).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(self._socket_path(domid))
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
        self._listeners[domid] = listener
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener, domid))

    def _close_listener(self, domid: int) -> None:
        listener = self._listeners.pop(domid)
        self._selector.unregister(listener)
        listener.close()
        Path(self._socket_path(domid)).unlink(missing_ok=True)

    def _accept(self, listener: socket.socket, domid: int) -> None:
        near, _ = listener.accept()
        near.setblocking(False)
        client = _Client(near, Session(self._registry, domid))
        self._clients.append(client)
        self._selector.register(near, selectors.EVENT_READ, partial(self._receive, client))

    def _receive(self, client: _Client) -> None:
        """Read from a client and serve it, or close a broken connection. `_flush` sends the answers afterwards."""
        try:
            data = client.near.recv(65536)
            client.session.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            data = b""
        if not data:
            self._hang_up(client)

    def _flush(self, client: _Client) -> None:
        outgoing = client.session.outgoing
        try:
            while outgoing:
                del outgoing[: client.near.send(outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            self._hang_up(client)
            return
        if len(outgoing) > _UNREAD_MAX:
            self._hang_up(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if outgoing else 0)
        key = self._selector.get_key(client.near)
        if key.events != wanted:
            self._selector.modify(client.near, wanted, key.data)

    def _hang_up(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            client.session.close()
            self._selector.unregister(client.near)
            client.near.close()

    def _run(self) -> None:
        while not self._is_stopping:
            for key, _ in self._selector.select():
                if key in self._selector.get_map().values():  # else an earlier event of this round has closed it
                    key.data()
            for client in list(self._clients):
                self._flush(client)
        self._woken.close()
        self._waker.close()
        self._selector.close()

    def _on_thread(self, function: Callable[[], T]) -> T:
        """Run a function on the loop's thread, or here if no loop runs or this is its thread; return its result."""
        if self._thread is None or self._thread is threading.current_thread():
            return function()
        future: Future[T] = Future()
        self._calls.append(partial(_settle, future, function))
        self._waker.send(b"!")
        return future.result()

    def _run_calls(self) -> None:
        self._woken.recv(4096)
        while self._calls:
            self._calls.popleft()()

    def _close_all(self) -> None:
        for client in list(self._clients):
            self._hang_up(client)
        for domid in list(self._listeners):
            self._close_listener(domid)
        self._is_stopping = True


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def main(arguments: list[str]) -> int:
    """Serve at the socket that the first argument names, with a domain for each other one, until SIGINT or SIGTERM."""
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before the thread starts, so that only sigwait gets them
    with Xenstored(arguments[0]) as xenstored:
        for domid in arguments[1:]:
            xenstored.add_domain_socket(int(domid))
        sys.stdout.write(f"serving {xenstored.address}\n")  # tells the caller that it may connect now
        sys.stdout.flush()
        signal.sigwait(stops)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
