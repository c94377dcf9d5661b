"""An opener as the service holds it, from its job to its end; see `opener.main` for what it does.

Must not wait for it: storage that does not answer hangs an opener, and no service.

What it says is believed: it is ours, and runs no code that a guest or an image has a hand in.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Sequence

from xenbackend.kernel.process import boost
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, datagrams, opening
from xenbackend.supervisor.service.process import Process

PATIENCE_S = 1.0  # for those that were killed
BREACH = 3  # exit status, `opener.main.BREACH`

# What was found, with its descriptors, which are the callee's; returns why the worker may not have it, or nothing.
OnFound = Callable[[opening.Found, list[int]], str]
OnEnd = Callable[["Opener", str], None]  # how it ended, where that is the worker's fault or its own
OnWaits = Callable[[str], None]  # the file whose storage does not answer, or nothing


class Opener:
    """One process.

    over_since   when nobody needed it any more; it has not ended yet, or is in a call from which it does not come back
    """

    def __init__(
        self, loop: Reactor, started: Process, on_found: OnFound, on_end: OnEnd, on_waits: OnWaits = lambda _: None
    ) -> None:
        """Listen to it from now on; it waits for its job."""
        self._loop = loop
        self._process = started
        self._on_found = on_found
        self._on_end = on_end
        self._on_waits = on_waits
        self.over_since: float | None = None  # by the loop's clock
        self._is_held = self._is_heard = True
        loop.add(started.socket.fileno(), self._receive)
        loop.add(started.pidfd, self._reap)

    def begin(self, job: opening.Job, worker: socket.socket, kept: Sequence[int]) -> None:
        """Give it its job, the socket of the worker that it is for, and what the job has kept, which stay the caller's.

        Raises: OSError.
        """
        fds = [worker.fileno(), *kept]
        most = opening.MAX_CARRIED
        self._send(job, fds[:most])
        for start in range(most, len(fds), most):
            self._send(opening.Ack(), fds[start : start + most])

    def boost(self) -> None:
        """Let it come before what else the host does: a guest waits for its worker."""
        boost(self._process.pid)

    def kill(self) -> None:
        """Kill it, and hear nothing more of it: the worker that it is for has ended."""
        if self._is_held:
            self._deafen()
            self._process.kill()
            self.note_over()

    def note_over(self) -> None:
        """Take note that it should end: its worker has what it wanted, or has gone."""
        if self.over_since is None:
            self.over_since = self._loop.now()

    def hangs(self, patience_s: float = 0.0) -> bool:
        """Return whether it should have ended so long ago."""
        return self.over_since is not None and self._loop.now() - self.over_since >= patience_s

    def end(self, patience_s: float = PATIENCE_S) -> None:
        """Kill it and let go of it, without a word to anybody; one that hangs in a call is left to itself."""
        if not self._is_held:
            return
        self._process.kill()
        self._let_go()
        if select.select([self._process.pidfd], [], [], patience_s)[0]:
            self._process.wait()
        else:
            self._process.leave()

    def leave(self) -> None:
        """Let go of it: it finds that we have gone, and ends when it is next asked for something new."""
        if self._is_held:
            self._let_go()
            self._process.leave()

    def _send(self, message: opening.FromSupervisor, fds: Sequence[int] = ()) -> None:
        datagrams.send(self._process.socket, opening.encode(message), fds, socket.MSG_DONTWAIT)

    def _receive(self) -> None:
        try:
            data, fds, _ = datagrams.receive(self._process.socket, opening.MAX_MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._deafen()  # its pidfd tells of its end
            return
        try:
            message = opening.from_opener(data)
        except codec.NotAMessage:
            message = None
        if isinstance(message, opening.Waits) and not fds:
            self._on_waits(message.name)
            return
        if not isinstance(message, opening.Found) or len(fds) != (not isinstance(message, opening.Undrained)):
            for fd in fds:  # we have no room for the descriptor, or it is of another version
                os.close(fd)
            self.kill()
            return
        try:
            refusal = self._on_found(message, fds)
            self._send(opening.Ack(refusal))
        except OSError:
            pass  # it is ending
        except Exception as bug:  # over this file; the next one is another matter
            self._loop.bug(bug)
            self.kill()

    def _reap(self) -> None:
        if not self._is_held:
            return
        self._let_go()
        status = self._process.wait()
        if status == BREACH:
            self._on_end(self, "it asks for what no worker asks an opener for")
        else:
            self._on_end(self, "")

    def _let_go(self) -> None:
        self._is_held = False
        self._loop.remove(self._process.pidfd)
        self._deafen()

    def _deafen(self) -> None:
        if self._is_heard:
            self._is_heard = False
            self._loop.remove(self._process.socket.fileno())
