"""Openers in threads of the test's process, for workers that the test starts without a service.

Must not know what a job is for: the test says that.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace

from xenbackend.kernel import datagram
from xenbackend.opener.main import serve
from xenbackend.protocol import opening
from xenbackend.worker.opener import RemoteOpener


class Openers:
    """Begins openers, and keeps what they open as a supervisor does.

    kept     O_PATH descriptors by name
    opened   what was opened for the first time, in order
    ends     exit statuses
    """

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self.opened: list[opening.Opened] = []
        self.ends: list[int] = []
        self._identities: dict[str, str] = {}
        self.refusal = ""  # for whatever is opened from now on
        self._threads: list[threading.Thread] = []

    def begin(self, job: opening.Job, kept: Mapping[str, int] = {}) -> socket.socket:
        """Begin one on a job, and return the end of the socket that its worker is to have."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            datagram.send(ours, opening.encode(job), [far.fileno(), *kept.values()])
        self._start(self._run, theirs)
        self._start(self._keep, ours)
        return near

    def remote(self, job: opening.Job) -> RemoteOpener:
        """Begin one for this process itself."""
        return RemoteOpener(self.begin(job))

    def remote_of(self, job: opening.Job) -> RemoteOpener:
        """Begin one that is given what the openers before have left."""
        kept = [opening.KeptFile(name, self._identities[name]) for name in self.kept]
        return RemoteOpener(self.begin(replace(job, kept=kept), self.kept))

    def close(self) -> None:
        """Wait for their ends; nobody is served by them any more."""
        while self._threads:
            self._threads.pop().join(20)
        for fd in self.kept.values():
            os.close(fd)
        self.kept.clear()

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _run(self, supervisor: socket.socket) -> None:
        with supervisor:
            self.ends.append(serve(supervisor))

    def _keep(self, far: socket.socket) -> None:
        with far:
            while True:
                data, fds, _ = datagram.receive(far, opening.MAX_MESSAGE, 1)
                if not data:
                    return
                message = opening.from_opener(data)
                assert isinstance(message, opening.Opened)
                self.opened.append(message)
                self._identities[message.name] = message.identity
                os.close(self.kept.pop(message.name, None) or os.dup(fds[0]))
                self.kept[message.name] = fds[0]
                far.send(opening.encode(opening.Ack(self.refusal)))
