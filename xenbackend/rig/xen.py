"""The simulated hypervisor as a small server on a Unix socket, in a thread or as a separate process.

Must not contain the rules of Xen, which are in `rig/hypervisor.py`.

    with Xen("/run/rig"): …                  or     python -m xenbackend.rig.xen /run/rig
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xenbackend.errors import KernelError
from xenbackend.rig import wire
from xenbackend.rig.hypervisor import Holder, Hypervisor


class Xen:
    """A simulated hypervisor whose socket lies in `directory`."""

    def __init__(self, directory: str | Path) -> None:
        """Listen on the socket; `serve` or `start` begins to answer calls. Raises: OSError."""
        self.directory = Path(directory)
        self._path = self.directory / wire.SOCKET
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self._path))
        self._listener.listen(64)
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._hypervisor = Hypervisor()
        self._clients: dict[int, tuple[socket.socket, Holder]] = {}
        self._thread = threading.Thread(target=self.serve, name="rig-xen", daemon=True)

    def start(self) -> None:
        """Serve in a thread until `close`."""
        self._thread.start()

    def stop(self) -> None:
        """Make `serve` return; may be called from a signal handler."""
        os.eventfd_write(self._stop, 1)

    def serve(self) -> None:
        """Answer calls until `stop`."""
        while True:
            events = self._epoll.poll()
            # Closed connections first: a caller that saw a process die must find its ports and mappings released.
            for fd in (fd for fd, event in events if event & select.EPOLLHUP):
                self._drop(fd)
            for fd in (fd for fd, event in events if not event & select.EPOLLHUP):
                if fd == self._stop:
                    return
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._answer(fd)

    def held(self, domid: int | None = None) -> dict[str, int]:
        """Return how many ``mappings``, ``pins`` (mapped pages) and ``ports`` of a domain, or of all, are held."""
        connection = wire.Connection(self.directory)
        try:
            return connection.call("held", domid=domid)[0]
        finally:
            connection.close()

    def close(self) -> None:
        """Stop, close every connection, and remove the socket."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join()
        for fd in list(self._clients):
            self._drop(fd)
        self._listener.close()
        self._epoll.close()
        os.close(self._stop)
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self._clients[client.fileno()] = (client, self._hypervisor.enter())
        self._epoll.register(client, select.EPOLLIN)

    def _answer(self, fd: int) -> None:
        client, holder = self._clients[fd]
        answer: dict[str, Any] = {}
        descriptors: list[int] = []
        try:
            arguments, _ = wire.receive(client)
            result, descriptors = self._hypervisor.call(holder, arguments.pop("call"), arguments)
            answer = {"result": result}
        except KernelError as error:
            answer = {"errno": error.errno}
        except (KeyError, TypeError, ValueError):
            answer = {"errno": errno.EBADMSG}
        try:
            wire.send(client, answer, descriptors)
        except OSError:  # it died in the meantime
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        client, holder = self._clients.pop(fd)
        self._epoll.unregister(client)
        client.close()
        self._hypervisor.leave(holder)


def main() -> None:
    """Serve in the directory that the command line names, until SIGTERM or SIGINT."""
    xen = Xen(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: xen.stop())
    xen.serve()
    xen.close()


if __name__ == "__main__":
    main()
