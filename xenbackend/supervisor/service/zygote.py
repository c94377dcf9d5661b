"""The process that workers are forked from, as the service holds it: asked for one, it has it in a few milliseconds.

Must not be needed: who gets None starts a worker by exec.

A worker that the zygote forked becomes our child, because orphans come to us meanwhile: how it ended is ours to hear,
as with one that we started. Other orphans, a driver's helpers, do not. See `worker.zygote` for what is said.

While we wait for a birth the service does nothing else. So that is short, and a worker that comes later is ended: it
has heard nothing yet. Until then the zygote is asked for no other one.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from xenbackend.kernel.process import adopting_orphans, boost, kill, unboost
from xenbackend.protocol import datagrams
from xenbackend.supervisor.service import process
from xenbackend.supervisor.service.process import Process

COMMAND = (sys.executable, "-m", "xenbackend.worker.zygote")
_PATIENCE_S = 0.5  # for a birth, which takes 5 ms on a quiet host


class Zygote:
    """One such process, from its start on."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it, and do not wait until it has imported everything. Raises: KernelError.

        It comes first for good: all it ever does is what a disk waits for.
        """
        self._process = process.start(command)
        boost(self.pid)
        self._is_ready = self._has_failed = False
        self._awaited = 0  # processes that it was asked for, while it has not said how that ended
        self._born: list[int] = []  # pidfds of those that it has named meanwhile
        self._too_late: list[int] = []  # pidfds of processes that nobody waited for

    @property
    def pid(self) -> int:
        """The process number, for people."""
        return self._process.pid

    @property
    def pidfd(self) -> int:
        """Readable once it has ended, by itself or killed."""
        return self._process.pidfd

    def fork(self, kinds: str, drivers: Sequence[str] = ()) -> list[Process]:
        """Return new processes, for each letter of `kinds` one, as `worker.zygote` knows them.

        A worker imports these drivers of third parties first.

        Return none where the zygote is not ready, or late, or fails: then it is good for nothing.

        Raises: KernelError.
        """
        if not self._hears():
            return []
        with ExitStack() as ours, ExitStack() as theirs:
            near, far = [], []
            for _ in kinds:
                pair = process.pair()
                near.append(ours.enter_context(pair[0]))
                far.append(theirs.enter_context(pair[1]))
            with adopting_orphans():
                pidfds = self._ask(kinds, drivers, far)
            if not pidfds:
                return []  # a process that is born too late ends
            ours.pop_all()
        born = [Process(*each) for each in zip(near, pidfds, strict=True)]
        for each in born:
            unboost(each.pid)
        return born

    def close(self) -> None:
        """Send it away. What it has forked goes on."""
        self._process.kill()
        self._process.describe_end()
        for pidfd in [*self._too_late, *self._born]:
            kill(pidfd)
            self._reap(pidfd, os.WEXITED)
        self._born, self._too_late = [], []

    def _hears(self) -> bool:
        """Return whether it waits to be asked; do not wait for that."""
        if self._awaited and not self._has_failed:
            for late in self._hear(0.0):
                kill(late)
                self._too_late.append(late)
        elif not self._is_ready and not self._has_failed:
            with suppress(OSError):  # it has said nothing yet, or has ended
                self._is_ready = self._process.socket.recv(16) == b"ready"
        self._too_late = [each for each in self._too_late if not self._reap(each, os.WEXITED | os.WNOHANG)]
        return self._is_ready and not self._has_failed and not self._awaited

    def _ask(self, kinds: str, drivers: Sequence[str], far: Sequence[socket.socket]) -> list[int]:
        """Have processes forked that serve `far`, and return their pidfds; none where they are not there in time."""
        self._awaited = len(far)
        try:
            request = f"{kinds} {','.join(drivers)}".encode()
            datagrams.send(self._process.socket, request, [each.fileno() for each in far])
        except OSError:
            self._fail()
            return []
        return self._hear(_PATIENCE_S)

    def _hear(self, patience_s: float) -> list[int]:
        """Wait for a birth for so long, and return the processes' pidfds; none where they are not there by then."""
        channel, give_up = self._process.socket, time.monotonic() + patience_s
        awaited = self._awaited
        try:
            while self._awaited:
                channel.settimeout(max(0.0, give_up - time.monotonic()))
                datagram, fds, _ = datagrams.receive(channel, 16, awaited)
                if fds and not self._born:
                    self._born = fds
                else:
                    self._awaited = 0
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            datagram, fds = b"", []
        finally:
            channel.setblocking(False)
        pidfds, self._born = self._born, []
        if datagram == b"born" and len(pidfds) == awaited and not fds:
            return pidfds
        for fd in [*fds, *pidfds]:
            os.close(fd)
        self._fail()
        return []

    def _fail(self) -> None:
        """Let nobody wait for it once more."""
        self._has_failed = True
        self._awaited = 0
        self._process.kill()

    @staticmethod
    def _reap(pidfd: int, options: int) -> bool:
        """Collect a process that came too late, if it has ended, and return whether it has."""
        try:
            if os.waitid(os.P_PIDFD, pidfd, options) is None:
                return False
        except ChildProcessError:  # it is not ours
            pass
        os.close(pidfd)
        return True
