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
        self._is_bearing = False  # it was asked, and has not said how that ended
        self._born = -1  # pidfd of the worker that it has named meanwhile
        self._too_late: list[int] = []  # pidfds of workers that nobody waited for

    @property
    def pid(self) -> int:
        """The process number, for people."""
        return self._process.pid

    @property
    def pidfd(self) -> int:
        """Readable once it has ended, by itself or killed."""
        return self._process.pidfd

    def fork(self, drivers: Sequence[str] = ()) -> Process | None:
        """Return a new worker, which imports these drivers of third parties first.

        None where the zygote is not ready, or fails at it: then it is good for nothing.

        Return none where the zygote is not ready, or fails at it: then it is good for nothing. Raises: KernelError.
        """
        if not self._hears():
            return None
        near, far = process.pair()
        with far, adopting_orphans():
            pidfd = self._ask(far, drivers)
        if pidfd < 0:
            near.close()  # so that a worker that is born too late ends
            return None
        worker = Process(near, pidfd)
        unboost(worker.pid)
        return worker

    def close(self) -> None:
        """Send it away. What it has forked goes on."""
        self._process.kill()
        self._process.describe_end()
        if self._born >= 0:
            self._too_late.append(self._born)
        for pidfd in self._too_late:
            kill(pidfd)
            self._reap(pidfd, os.WEXITED)
        self._born, self._too_late = -1, []

    def _hears(self) -> bool:
        """Return whether it waits to be asked; do not wait for that."""
        if self._is_bearing and not self._has_failed:
            late = self._hear(0.0)
            if late >= 0:
                kill(late)
                self._too_late.append(late)
        elif not self._is_ready and not self._has_failed:
            with suppress(OSError):  # it has said nothing yet, or has ended
                self._is_ready = self._process.socket.recv(16) == b"ready"
        self._too_late = [each for each in self._too_late if not self._reap(each, os.WEXITED | os.WNOHANG)]
        return self._is_ready and not self._has_failed and not self._is_bearing

    def _ask(self, far: socket.socket, drivers: Sequence[str]) -> int:
        """Have a worker forked that serves `far`, and return its pidfd; -1 where there is none in time."""
        self._is_bearing = True
        try:
            socket.send_fds(channel, [f"fork {','.join(drivers)}".encode()], [far.fileno()])
            datagram, fds, _ = process.receive(channel, 16, 1)
            if fds:
                pidfd = fds[0]
                channel.settimeout(max(0.0, give_up - time.monotonic()))
                datagram = channel.recv(16)
        except OSError:
            self._fail()
            return -1
        return self._hear(_PATIENCE_S)

    def _hear(self, patience_s: float) -> int:
        """Wait for a birth for so long, and return the worker's pidfd; -1 where there is none by then."""
        channel, give_up = self._process.socket, time.monotonic() + patience_s
        try:
            while self._is_bearing:
                channel.settimeout(max(0.0, give_up - time.monotonic()))
                datagram, fds, _ = process.receive(channel, 16, 1)
                if fds and self._born < 0:
                    self._born = fds[0]
                else:
                    self._is_bearing = False
        except (TimeoutError, BlockingIOError):
            return -1
        except OSError:
            datagram, fds = b"", []
        finally:
            channel.setblocking(False)
        pidfd, self._born = self._born, -1
        if datagram == b"born" and pidfd >= 0 and not fds:
            return pidfd
        for fd in [*fds, pidfd]:
            if fd >= 0:
                os.close(fd)
        self._fail()
        return -1

    def _fail(self) -> None:
        """Let nobody wait for it once more."""
        self._has_failed = True
        self._is_bearing = False
        self._process.kill()

    @staticmethod
    def _reap(pidfd: int, options: int) -> bool:
        """Collect a worker that came too late, if it has ended, and return whether it has."""
        try:
            if os.waitid(os.P_PIDFD, pidfd, options) is None:
                return False
        except ChildProcessError:  # it is not ours
            pass
        os.close(pidfd)
        return True
