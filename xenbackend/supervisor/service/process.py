"""A process of ours with a socket to it: started by exec, told of its end by a pidfd.

Must not know what is said over the socket.

No signal handler is needed, and no process number can be mistaken for its successor's.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from xenbackend.errors import KernelError
from xenbackend.kernel.process import kill, unboost

_TOLD = {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}


class Process:
    """A process as somebody holds it who may not be its parent.

    socket      our end
    pidfd       readable once it has ended
    pid         its number, for people
    """

    def __init__(self, near: socket.socket, pidfd: int) -> None:
        self.socket = near
        self.pidfd = pidfd
        self.pid = _pid_of(pidfd)
        near.setblocking(False)

    def kill(self) -> None:
        """Kill it; whoever waits for the pidfd hears of its end."""
        kill(self.pidfd)

    def wait(self) -> int:
        """Wait for the end, close both descriptors, and return the exit status; less than 0: a signal, or unknown."""
        end = self._collect()
        if end is None:
            return -1
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def describe_end(self) -> str:
        """Wait for the end, collect the exit status where we may, close both descriptors, and return how it ended."""
        end = self._collect()
        if end is None:
            return "the worker has ended"
        if end.si_code == os.CLD_EXITED:
            return f"the worker ended unexpectedly with exit status {end.si_status}"
        return f"the worker was ended by {signal.Signals(end.si_status).name}"

    def _collect(self) -> os.waitid_result | None:
        try:
            return os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        except ChildProcessError:  # it is an earlier service's
            return None
        finally:
            self.leave()

    def leave(self) -> None:
        """Close both descriptors; somebody else may have them too."""
        self.socket.close()
        os.close(self.pidfd)


def start(command: Sequence[str]) -> Process:
    """Start a program that gets the number of its end of the socket after ``--socket``. Raises: KernelError."""
    with ExitStack() as undo:
        near, far = pair()
        undo.callback(near.close)
        try:
            with far:
                # A session of its own: a Ctrl-C meant for the service must not end the workers before they are drained.
                child = subprocess.Popen(  # noqa: S603 - the command is ours
                    [*command, "--socket", str(far.fileno())],
                    pass_fds=[far.fileno()],
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            pidfd = os.pidfd_open(child.pid)
        except OSError as error:
            raise KernelError("start a worker process", error.errno or errno.EIO) from None
        undo.pop_all()
    child.returncode = 0  # `Process` waits for it
    started = Process(near, pidfd)
    unboost(started.pid)  # we may be in a boost ourselves
    return started


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a socket for a process. Raises: KernelError."""
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise KernelError("make a socket for a worker process", error.errno or errno.EIO) from None


def _environment() -> dict[str, str]:
    """Return what a process of ours is told of ours: where Python and its parts are, and nothing of the service's."""
    return {name: value for name, value in os.environ.items() if name in _TOLD or name.startswith("PYTHON")}


def _pid_of(pidfd: int) -> int:
    """Return the number of the process behind a pidfd; 0 once it is gone, or where we have no descriptor to look."""
    with suppress(OSError):
        for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key == "Pid":
                return max(0, int(value))
    return 0
