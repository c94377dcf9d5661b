"""The service's side of an opener, from its job to its end; see `opener.main` for what an opener does.

Must not wait for it: storage that does not answer may hang an opener, but not the service.

An opener is trusted: it is our own program, and runs no code that a guest or an image could influence.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from xenbackend.kernel.process import state_of
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, datagrams, jobs, opening
from xenbackend.supervisor.service.process import Process

PATIENCE_S = 1.0  # for killed openers to end
GRACE_S = 5.0  # to end by itself, for one whose worker has what it wanted; a worker could keep it for ever
_ENDING_S = 10.0  # enough for any opener to end that does not hang, however busy the host is
_MESSAGES = 8  # more than it says without waiting for an answer
_UNINTERRUPTIBLE = "D"  # proc_pid_stat(5)
BREACH = 3  # exit status, `opener.main.BREACH`

# What was found, with its descriptors, which are the callee's; returns why the worker may not have it, or nothing.
OnFound = Callable[[opening.Found, list[int]], str]
OnEnd = Callable[["Opener", str], None]  # gets the opener, and its worker's breach; empty: there was none
OnWaits = Callable[[opening.Waits], None]


class Assignment:
    """A job, the socket of the worker that it is for, and descriptors of what the job has kept."""

    def __init__(self, job: jobs.Job, worker: socket.socket, kept: Sequence[int]) -> None:
        """Own the worker's socket from now on; the descriptors `kept` stay the caller's."""
        self.job = job
        self.worker = worker
        self.kept = kept
        self._own: list[int] = []

    def keep(self) -> None:
        """Replace the caller's descriptors by copies, since the caller may close its own. Raises: OSError."""
        try:
            for fd in self.kept:
                self._own.append(os.dup(fd))
        except OSError:
            self.close()
            raise
        self.kept = self._own

    def close(self) -> None:
        """Close all that is its own."""
        self.worker.close()
        own, self._own = self._own, []
        for fd in own:
            os.close(fd)


class Opener:
    """An opener: a process, or one that waits for its turn to become a process.

    over_since   since when it is no longer needed, though it has not ended yet, or hangs in a call; None: it is needed.
                 What it opens after that is not kept
    """

    def __init__(
        self,
        loop: Reactor,
        assignment: Assignment,
        on_found: OnFound,
        on_end: OnEnd,
        on_waits: OnWaits = lambda _: None,
    ) -> None:
        """Do nothing until `begin`; the assignment is its own from now on."""
        self._loop = loop
        self._assignment = assignment
        self._process: Process | None = None
        self._on_found = on_found
        self._on_end = on_end
        self._on_waits = on_waits
        self._is_boosted = False
        self.over_since: float | None = None  # by the loop's clock
        self._is_held, self._is_heard = True, False
        self._overdue = loop.timer(self._end_at_last)

    def begin(self, started: Process) -> None:
        """Become this process, and give it its job.

        Raises: OSError, if it has ended or cannot be watched, and then has nothing of ours; another one may be tried.
        """
        near, assignment = started.socket, self._assignment
        fds = [assignment.worker.fileno(), *assignment.kept]
        most = opening.MAX_CARRIED
        with ExitStack() as undo:
            self._loop.add(near.fileno(), partial(self._receive, started))
            undo.callback(self._loop.remove, near.fileno())
            started.watch(self._loop, partial(self._reap, started))
            undo.callback(started.unwatch)
            _send(near, assignment.job, fds[:most])
            for start in range(most, len(fds), most):
                _send(near, opening.Ack(), fds[start : start + most])
            undo.pop_all()
        assignment.close()
        self._process = started
        self._is_heard = True
        if self._is_boosted:
            started.boost()

    @property
    def waits(self) -> bool:
        """Return whether it has not begun, but may."""
        return self._process is None and self._is_held

    def boost(self) -> None:
        """Give it priority over the rest of the host, because a guest waits for its worker."""
        self._is_boosted = True
        if self._process is not None:
            self._process.boost()

    def hear(self) -> None:
        """Handle what it has said before the loop comes to that."""
        for _ in range(_MESSAGES):
            if self._process is not None and self._is_heard:
                self._receive(self._process)

    def kill(self) -> None:
        """Kill it and stop listening to it, because the worker that it is for has ended."""
        if self.waits:
            self.give_up()
        elif self._process is not None and self._is_held:
            self._deafen(self._process)
            self._process.kill()
            self.note_over()
            self._overdue.set(None)

    def give_up(self) -> None:
        """End before it has begun; its worker finds the socket closed."""
        self._is_held = False
        self._assignment.close()
        self._on_end(self, "")

    def note_over(self) -> None:
        """Note that it should end: its worker has what it wanted, or has gone."""
        if self.waits:
            self.give_up()
        elif self.over_since is None:
            self.over_since = self._loop.now()
            self._overdue.set(self.over_since + GRACE_S)

    def _end_at_last(self) -> None:
        """Kill one that has not ended by itself, but not one that is waiting for storage, which then ends."""
        if self._process is not None and state_of(self._process.pid) == _UNINTERRUPTIBLE:
            self._overdue.set(self._loop.now() + GRACE_S)
        else:
            self.kill()

    def hangs(self) -> bool:
        """Return whether it should have ended, but is in an uninterruptible call, or should have ended long ago.

        One that was killed and has merely had no CPU time since does not hang.
        """
        if self.over_since is None or self._process is None:
            return False
        return state_of(self._process.pid) == _UNINTERRUPTIBLE or self._loop.now() - self.over_since >= _ENDING_S

    def end(self, patience_s: float = PATIENCE_S) -> None:
        """Kill it and close everything, without calling anybody. One that hangs in a call is left behind."""
        started = self._process
        if started is None:
            self.kill()
        elif self._is_held:
            started.kill()
            self._let_go(started)
            if not started.is_there or select.select([started.pidfd], [], [], patience_s)[0]:
                started.wait()
            else:
                started.leave()

    def leave(self) -> None:
        """Close our ends. It finds that we have gone, and ends when it is next asked for something new.

        One that has not begun never does: the next service starts another worker.
        """
        if self._process is None:
            self.kill()
        elif self._is_held:
            self._let_go(self._process)
            self._process.leave()

    def _receive(self, started: Process) -> None:
        try:
            data, fds, _ = datagrams.receive(started.socket, opening.MAX_MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._deafen(started)  # its pidfd reports its end
            return
        try:
            message = opening.from_opener(data)
        except codec.NotAMessage:
            message = None
        if isinstance(message, opening.Waits) and not fds:
            self._on_waits(message)
            return
        is_found = isinstance(message, opening.Found) and len(fds) == (not isinstance(message, opening.Undrained))
        is_late = bool(fds) and self.over_since is not None  # its storage has answered too late
        if not isinstance(message, opening.Found) or not is_found or is_late:
            for fd in fds:  # we have no room for the descriptor, it is of another version, or it is not wanted any more
                os.close(fd)
            self.kill()
            return
        try:
            refusal = self._on_found(message, fds)
            _send(started.socket, opening.Ack(refusal))
        except OSError:
            pass  # it is ending
        except Exception as bug:  # this opener alone fails
            self._loop.bug(bug)
            self.kill()

    def _reap(self, started: Process) -> None:
        if not self._is_held:
            return
        self._let_go(started)
        status = started.wait()
        if status == BREACH:
            self._on_end(self, "it sent a question that no worker asks an opener")
        else:
            self._on_end(self, "")

    def _let_go(self, started: Process) -> None:
        self._is_held = False
        self._overdue.set(None)
        started.unwatch()
        self._deafen(started)

    def _deafen(self, started: Process) -> None:
        if self._is_heard:
            self._is_heard = False
            self._loop.remove(started.socket.fileno())


def _send(near: socket.socket, message: opening.FromSupervisor, fds: Sequence[int] = ()) -> None:
    datagrams.send(near, opening.encode(message), fds, socket.MSG_DONTWAIT)
