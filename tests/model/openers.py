"""Openers within this process, which replace opener processes: the product's rules, asked by calls, without a socket.

Must not open what the product's would not: each is an `opener.main.Attendant`, and answers as that does.

What an opener opens belongs to the worker that asks, and is lost when that dies; what it hands over belongs to the
service.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.model.machine import Died
from xenbackend.opener.main import Attendant, SupervisorGone
from xenbackend.protocol import jobs, opening
from xenbackend.worker.opener import OpenerGone, RemoteOpener

if TYPE_CHECKING:
    from tests.model.world import World


class LocalOpener(Attendant):
    """An opener as the service sees it, in the place of `supervisor.service.opener.Opener`."""

    def __init__(
        self, world: World, job: jobs.Job, kept: Sequence[int], on_found: Callable[[opening.Found, list[int]], str]
    ) -> None:
        nobody: Any = None
        super().__init__(job, nobody, nobody, {})
        with world.machine.outside():
            self._lent = [os.dup(fd) for fd in kept]
        self._world = world
        self._service: Any = world.machine.running
        self._on_found: Callable[[opening.Found, list[int]], str] | None = on_found
        self._is_gone = False

    def ask(self, question: opening.Question) -> tuple[opening.Given, list[int]]:
        """Answer the worker that runs now. Raises: OpenerGone."""
        if self._is_gone:
            raise OpenerGone
        if self._lent:
            files = self._job.kept
            self._kept = {file.name: os.dup(fd) for file, fd in zip(files, self._lent, strict=True)}
            self._give_back()
        try:
            return self.answer(opening.from_worker(opening.encode(question)))
        except SupervisorGone:
            self._is_gone = True
            raise OpenerGone from None

    def _say(self, found: opening.Found, fds: Sequence[int]) -> str:
        service = self._service
        if self._on_found is None:
            raise SupervisorGone
        refusal: str | None = None
        with suppress(Died), service.running():
            refusal = self._on_found(found, [os.dup(fd) for fd in fds])
        if refusal is None:  # not before: an exception that is being handled keeps objects alive that must be collected
            service.kill("killed")
            raise SupervisorGone
        return refusal

    def lose_service(self) -> None:
        """Drop references to a service that has ended."""
        self._on_found = None

    def boost(self) -> None:
        """Do nothing: priorities do not matter here."""

    def kill(self) -> None:
        """End it, as its worker has ended."""
        self._is_gone = True
        self._give_back()

    end = kill

    def note_over(self) -> None:
        """Do nothing: the service does not need it any more."""

    def hear(self) -> None:
        """Do nothing: what it says is handled at once."""

    def hangs(self) -> bool:
        """Return False: nothing hangs here."""
        return False

    def leave(self) -> None:
        """Leave it to its worker, without the service."""
        self.lose_service()

    def _give_back(self) -> None:
        while self._lent:
            with self._world.machine.outside():
                os.close(self._lent.pop())


class Asked(RemoteOpener):
    """The opener as its worker sees it."""

    world: World

    def __init__(self, near: socket.socket, chain: int = 0, _patience_s: float | None = None) -> None:
        super().__init__(near, chain)
        worker: Any = self.world.machine.running
        worker.sockets.append(near)  # of which the kernel takes back the descriptor, whoever still refers to the object

    def _transact(self, question: opening.Question) -> tuple[opening.FromOpener | None, list[int]]:
        opener = self.world.openers.get(os.fstat(self._socket.fileno()).st_ino)
        return (None, []) if opener is None else opener.ask(question)

    def close(self) -> None:
        opener = self.world.openers.pop(os.fstat(self._socket.fileno()).st_ino, None)
        if opener is not None:
            opener.close()
            opener.kill()
        os.close(self._socket.detach())  # which is taken note of


def begin(world: World, job: jobs.Job, kept: Sequence[int], on_found: Any) -> tuple[Any, socket.socket]:
    """Start an opener, and return it with the socket that its worker gets."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.close()
    opener = world.openers[os.fstat(near.fileno()).st_ino] = LocalOpener(world, job, kept, on_found)
    return opener, near
