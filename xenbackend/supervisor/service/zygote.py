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
from contextlib import ExitStack, suppress

from xenbackend.kernel import datagram as datagrams
from xenbackend.kernel.process import adopting_orphans, boost, unboost
from xenbackend.protocol.datagrams import receive
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

    def fork(self, kinds: str) -> list[Process]:
        """Return new processes, for each letter of `kinds` one, as `worker.zygote` knows them.

        Return none where the zygote is not ready, or fails at it: then it is good for nothing. Raises: KernelError.
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
                pidfds = self._ask(kinds, far)
            if not pidfds:
                self._has_failed = True  # nobody waits for it once more; a process that is born too late ends
                self._process.kill()
                return []
            ours.pop_all()
        born = [Process(*each) for each in zip(near, pidfds, strict=True)]
        for each in born:
            unboost(each.pid)
        return born

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

    def _ask(self, kinds: str, far: Sequence[socket.socket]) -> list[int]:
        """Have processes forked that serve `far`, and return their pidfds; none where they are not there in time."""
        channel = self._process.socket
        pidfds: list[int] = []
        give_up = time.monotonic() + _PATIENCE_S
        channel.settimeout(_PATIENCE_S)
        try:
            socket.send_fds(channel, [b"fork"], [far.fileno()])
            datagram, fds, _ = receive(channel, 16, 1)
            if fds:
                pidfd = fds[0]
                channel.settimeout(max(0.0, give_up - time.monotonic()))
                datagram = channel.recv(16)
        except OSError:
            datagram = b""
        if datagram != b"born" or len(pidfds) != len(far):
            for pidfd in pidfds:
                os.close(pidfd)
            return []
        return pidfds
