"""The process that workers are forked from, as the service holds it: asked for one, it has it in a few milliseconds.

Must not be needed: who gets None starts a worker by exec.

A worker that the zygote forked becomes our child, because orphans come to us meanwhile: how it ended is ours to hear,
as with one that we started. Other orphans, a driver's helpers, do not. See `worker.zygote` for what is said.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from xenbackend.kernel.process import adopting_orphans, boost, unboost
from xenbackend.supervisor.service import process
from xenbackend.supervisor.service.process import Process

COMMAND = (sys.executable, "-m", "xenbackend.worker.zygote")
_PATIENCE_S = 5.0  # for a birth on a crowded host, where a worker by exec would take still longer


class Zygote:
    """One such process, from its start on."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it, and do not wait until it has imported everything. Raises: KernelError.

        It comes first for good: all it ever does is what a disk waits for.
        """
        self._process = process.start(command)
        boost(self.pid)
        self._is_ready = self._has_failed = False

    @property
    def pid(self) -> int:
        """The process number, for people."""
        return self._process.pid

    @property
    def pidfd(self) -> int:
        """Readable once it has ended, by itself or killed."""
        return self._process.pidfd

    def fork(self) -> Process | None:
        """Return a new worker, or None where the zygote is not ready, or fails at it: then it is good for nothing.

        Raises: KernelError.
        """
        if not self._hears():
            return None
        near, far = process.pair()
        with far, adopting_orphans():
            pidfd = self._ask(far)
        if pidfd < 0:
            near.close()  # so that a worker that is born too late ends
            self._has_failed = True  # nobody waits for it once more
            self._process.kill()
            return None
        worker = Process(near, pidfd)
        unboost(worker.pid)
        return worker

    def close(self) -> None:
        """Send it away. What it has forked goes on."""
        self._process.kill()
        self._process.describe_end()

    def _hears(self) -> bool:
        """Return whether it has said that it is ready; do not wait for that."""
        if not self._is_ready and not self._has_failed:
            with suppress(OSError):  # it has said nothing yet, or has ended
                self._is_ready = self._process.socket.recv(16) == b"ready"
        return self._is_ready and not self._has_failed

    def _ask(self, far: socket.socket) -> int:
        """Have a worker forked that serves `far`, and return its pidfd; -1 where there is none in time."""
        channel, pidfd = self._process.socket, -1
        give_up = time.monotonic() + _PATIENCE_S
        channel.settimeout(_PATIENCE_S)
        try:
            socket.send_fds(channel, [b"fork"], [far.fileno()])
            datagram, fds, _ = process.receive(channel, 16, 1)
            if fds:
                pidfd = fds[0]
                channel.settimeout(max(0.0, give_up - time.monotonic()))
                datagram = channel.recv(16)
        except OSError:
            datagram = b""
        if datagram != b"born" and pidfd >= 0:
            os.close(pidfd)
            pidfd = -1
        return pidfd
