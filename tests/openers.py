"""Openers in threads of the test's process, for workers that the test starts without a service.

Must not know what a job is for: the test says that.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from xenbackend.block.driver import Found
from xenbackend.kernel.inuse import InUse
from xenbackend.kernel.locks import Access
from xenbackend.opener.main import serve
from xenbackend.protocol import datagrams, jobs, opening
from xenbackend.worker.opener import RemoteOpener


class EachRemote:
    """Uses a separate opener for each image, as if that were a disk's chain; implements `worker.files.Opener`."""

    def __init__(self, openers: Openers) -> None:
        self._openers = openers
        self._remotes: dict[tuple[str, int], RemoteOpener] = {}  # by path and thread

    def hold(self, path: str) -> None:
        """Do nothing, as `RemoteOpener`."""

    def release(self, path: str) -> None:
        """Do nothing, as `RemoteOpener`."""

    def open(self, path: str, *, write: bool, claims: bool = False) -> tuple[int, opening.Facts]:
        """Open what the name means now."""
        return self._begin(path, shareable=not claims).open(path, write=write, claims=claims)

    def is_used_beside(self, path: str, fd: int, access: Access) -> bool:
        """Look at the file that was opened last by this name."""
        return self._remotes[path, threading.get_ident()].is_used_beside(path, fd, access)

    def why_in_use(self, path: str, access: Access, *, is_claimed: bool, with_names: bool) -> InUse:
        """Return who uses the file that was opened last by this name."""
        return self._remotes[path, threading.get_ident()].why_in_use(
            path, access, is_claimed=is_claimed, with_names=with_names
        )

    def look(self, path: str) -> opening.Facts:
        """Look at what the name means now."""
        return self._begin(path).look(path)

    def open_record(self, path: str, *, creates: bool = True) -> int:
        """Refuse: there are no record files here."""
        raise NotImplementedError(path)

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Refuse it."""
        raise NotImplementedError(image)

    def resolve(self, path: str) -> str:
        """Refuse it."""
        raise NotImplementedError(path)

    def close(self) -> None:
        """Let the openers end."""
        while self._remotes:
            self._remotes.popitem()[1].close()

    def _begin(self, path: str, *, shareable: bool = False) -> RemoteOpener:
        key = path, threading.get_ident()
        if key in self._remotes:
            self._remotes[key].close()
        remote = self._openers.remote(jobs.Job("vbd/5/51712", [f"aio:{path}"], False, shareable))
        self._remotes[key] = remote
        return remote


class Openers:
    """Begins openers, and keeps what they open as a supervisor does.

    kept     O_PATH descriptors by name
    opened   what was opened for the first time, in order
    memories   by name
    connections   sockets by server and place; `undrained`: those that could not be drained
    ends     exit statuses
    """

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self.opened: list[opening.Opened] = []
        self.memories: dict[str, int] = {}
        self.connections: dict[tuple[str, int], int] = {}
        self.undrained: list[opening.Undrained] = []
        self.ends: list[int] = []
        self._identities: dict[str, str] = {}
        self.refusal = ""  # for whatever is opened from now on
        self._threads: list[threading.Thread] = []

    def begin(self, job: jobs.Job, kept: Mapping[str, int] = {}) -> socket.socket:
        """Start an opener on a job, and return its worker's end of the socket."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connections = [jobs.KeptConnection(*key) for key in self.connections]
        job = replace(job, connections=connections)
        with far:
            datagrams.send(ours, opening.encode(job), [far.fileno(), *kept.values(), *self.connections.values()])
        self._start(self._run, theirs)
        self._start(self._keep, ours)
        return near

    def remote(self, job: jobs.Job) -> RemoteOpener:
        """Start an opener for this process itself."""
        return RemoteOpener(self.begin(job))

    def remote_of(self, job: jobs.Job) -> RemoteOpener:
        """Start an opener that gets the files which earlier openers have left."""
        kept = [jobs.KeptFile(name, self._identities[name]) for name in self.kept]
        return RemoteOpener(self.begin(replace(job, kept=kept), self.kept))

    def now(self) -> float:
        """Return seconds of a clock that only goes forward."""
        return time.monotonic()

    def disconnected(self, server: str, place: int, inode: int) -> None:
        """Drop a connection that its worker has closed in order, as the supervisor does."""
        fd = self.connections.get((server, place), -1)
        if fd >= 0 and os.fstat(fd).st_ino == inode:
            self._drop((server, place))

    def _drop(self, key: tuple[str, int]) -> None:
        fd = self.connections.pop(key, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Wait until all openers have ended; no worker uses them any more."""
        while self._threads:
            self._threads.pop().join(20)
        while self.connections:
            os.close(self.connections.popitem()[1])
        for fd in self.kept.values():
            os.close(fd)
        self.kept.clear()
        while self.memories:
            os.close(self.memories.popitem()[1])

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _run(self, supervisor: socket.socket) -> None:
        with supervisor:
            self.ends.append(serve(supervisor))

    def _keep(self, far: socket.socket) -> None:
        with far:
            while True:
                data, fds, _ = datagrams.receive(far, opening.MAX_MESSAGE, 1)
                if not data:
                    return
                message = opening.from_opener(data)
                match message:
                    case opening.Opened():
                        self.opened.append(message)
                        self._identities[message.name] = message.identity
                        os.close(self.kept.pop(message.name, None) or os.dup(fds[0]))
                        self.kept[message.name] = fds[0]
                    case opening.Made():
                        if message.name in self.memories:
                            os.close(self.memories[message.name])
                        self.memories[message.name] = fds[0]
                    case opening.Connected():
                        gone = list(self.connections) if message.is_alone else [(message.server, message.place)]
                        for key in gone:
                            self._drop(key)
                        self.connections[message.server, message.place] = fds[0]
                    case opening.Undrained():
                        self.undrained.append(message)
                    case _:
                        assert isinstance(message, opening.Waits)
                        continue  # nobody acknowledges it
                far.send(opening.encode(opening.Ack(self.refusal)))
