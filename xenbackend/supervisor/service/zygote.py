"""The service's side of the zygote, from which workers are forked: asks for processes, and says when they are there.

Must not be waited for, nor be needed: if it fails or is late, `births` has the processes started by exec.

A worker that the zygote forks becomes our child, because we adopt orphans meanwhile; so we learn how it ended, as of
one that we started. Other orphans, such as a driver's helpers, are not adopted. See `worker.zygote` for the messages.

A forked process waits for its socket, and gets it once we hold its pidfd. One that is not wanted any more when it comes
gets none, and ends: it has heard nothing.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from xenbackend.errors import KernelError
from xenbackend.kernel.process import adopt_orphans, boost
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import datagrams
from xenbackend.supervisor.service import process
from xenbackend.supervisor.service.process import Process

COMMAND = (sys.executable, "-m", "xenbackend.worker.zygote")
_MOST = 16  # descriptors beside a message; it is our program, and sends as many as it was asked for
_CLOSING_S = 1.0  # for each process that nobody wanted to end


class Zygote:
    """One zygote, from its start on.

    is_ready   whether it waits to be asked
    is_over    whether it has failed or was closed; then it is killed
    asked      the processes that it is asked for now, in their order; empty if there are none
    """

    def __init__(self, loop: Reactor, command: Sequence[str], on_change: Callable[[], object]) -> None:
        """Start it; `on_change` is called when one of its attributes has changed by itself. Raises: KernelError.

        It is boosted for good, because a disk waits for all that it ever does.
        """
        self._process = process.start(command)
        boost(self.pid)
        self._loop = loop
        self._on_change = on_change
        self.is_ready = self.is_over = False
        self.asked: Sequence[Process] = ()
        self._cords: list[socket.socket] = []  # to the processes that it is asked for
        self._born: list[int] = []  # their pidfds, once it has sent them
        self._late: set[int] = set()  # pidfds of processes that nobody wanted any more, until they have ended
        loop.add(self._process.socket.fileno(), self._receive)

    @property
    def pid(self) -> int:
        """The process number, for people."""
        return self._process.pid

    def ask(self, kinds: str, drivers: Sequence[str], processes: Sequence[Process]) -> None:
        """Ask for one process for each letter of `kinds`, as `worker.zygote` knows them; it must be ready.

        A worker is for a chain of these drivers. A process that is not wanted any more when it comes ends.
        """
        far: list[socket.socket] = []
        try:
            adopt_orphans(does=True)
            for _ in kinds:
                near, end = process.pair()
                self._cords.append(near)
                far.append(end)
            request = f"{kinds} {','.join(drivers)}".encode()
            datagrams.send(self._process.socket, request, [each.fileno() for each in far], socket.MSG_DONTWAIT)
        except (KernelError, OSError):
            self._fail()
        else:
            self.is_ready, self.asked = False, processes
        finally:
            for each in far:
                each.close()

    def forget(self) -> None:
        """Stop waiting for the processes that it is asked for now: others are started instead.

        It is not ready before it has answered.
        """
        self.asked = ()

    def close(self) -> None:
        """End it. What it has forked goes on."""
        self._process.kill()
        if not self.is_over:
            self._loop.remove(self._process.socket.fileno())
        self._has_answered()
        self.is_ready, self.is_over, self.asked = False, True, ()
        self._process.describe_end()
        for pidfd in list(self._late):
            if select.select([pidfd], [], [], _CLOSING_S)[0]:
                self._reap(pidfd)
            else:
                self._let_go(pidfd)

    def _receive(self) -> None:
        try:
            datagram, fds, _ = datagrams.receive(self._process.socket, 16, _MOST)
        except BlockingIOError:
            return
        except OSError:
            datagram, fds = b"", []
        if datagram == b"pidfd" and not self._born and len(fds) == len(self._cords) > 0:
            self._born = fds
            return
        for fd in fds:
            os.close(fd)
        if datagram == b"born" and self._born:
            self._deliver()
        elif datagram != b"ready" or self._cords or self.is_ready:
            self._fail()
        self.is_ready = not self.is_over
        self._on_change()

    def _deliver(self) -> None:
        """Give each process that is still wanted its socket. The others end without one."""
        pidfds, self._born = self._born, []
        cords, self._cords = self._cords, []
        asked: Sequence[Process | None] = self.asked or [None] * len(pidfds)
        self.asked = ()
        with suppress(KernelError):
            adopt_orphans(does=False)
        for pidfd, cord, each in zip(pidfds, cords, asked, strict=True):
            with cord:
                if each is not None and each.far is not None:
                    each.arrive(pidfd, partial(_give, cord))
                else:
                    self._late.add(pidfd)
                    self._loop.add(pidfd, partial(self._reap, pidfd))

    def _has_answered(self) -> None:
        """Stop waiting for what it was asked for. Each process finds its cord cut, and ends."""
        for cord in self._cords:
            cord.close()
        self._cords = []
        for pidfd in self._born:
            self._late.add(pidfd)
            self._loop.add(pidfd, partial(self._reap, pidfd))
        self._born = []
        with suppress(KernelError):
            adopt_orphans(does=False)

    def _fail(self) -> None:
        """Kill it, and accept no more requests. It will not start the processes that are still in `asked`."""
        self.is_ready, self.is_over = False, True
        self._loop.remove(self._process.socket.fileno())
        self._has_answered()
        self._process.kill()

    def _reap(self, pidfd: int) -> None:
        """Collect a process that nobody wanted."""
        with suppress(ChildProcessError):  # it is not our child
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        self._let_go(pidfd)

    def _let_go(self, pidfd: int) -> None:
        self._late.discard(pidfd)
        self._loop.remove(pidfd)
        os.close(pidfd)


def _give(cord: socket.socket, far: socket.socket) -> None:
    with suppress(OSError):  # it has died already, as its pidfd shows
        datagrams.send(cord, b"socket", [far.fileno()], socket.MSG_DONTWAIT)
