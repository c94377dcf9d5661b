"""A process of ours with a socket to it, and a pidfd that tells of its end; how one is started by exec.

Must not know what is said over the socket, nor wait until a process is there: it can be spoken to and let go of before.
What is said until then waits in the socket, whose other end is nobody's but ours. So a process that nobody wants any
more when it comes has heard nothing.

No signal handler is needed, and no process number can be mistaken for its successor's.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from xenbackend.errors import KernelError
from xenbackend.kernel.process import boost, kill, unboost
from xenbackend.loop.reactor import Reactor

# CREDENTIALS_DIRECTORY says where an opener finds passphrases, systemd.exec(5).
_TOLD = {"CREDENTIALS_DIRECTORY", "PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}


class Process:
    """A process as somebody holds it who may not be its parent, and who may hold it before it is there.

    socket      our end; what is said meanwhile waits in it
    is_there    whether it was started, whatever became of it since
    pidfd       readable once it has ended; -1 before it is there, and once we have let go of it
    pid         its number, for people; 0 before it is there
    far         its end, while it is not there yet and somebody wants it; else None
    """

    def __init__(self, near: socket.socket, pidfd: int = -1, far: socket.socket | None = None) -> None:
        """Hold a process by its pidfd, or one that will be given `far`, which is ours until then."""
        self.socket = near
        self.is_there = pidfd >= 0
        self.pidfd = pidfd
        self.pid = _pid_of(pidfd) if self.is_there else 0
        self.far = far
        self._why_not = ""
        self._is_boosted = False
        self._loop: Reactor | None = None
        self._on_end: Callable[[], object] = int
        self._when_there: list[Callable[[], object]] = []
        near.setblocking(False)

    @classmethod
    def to_come(cls) -> Process:
        """Return one that is not there yet. Raises: KernelError."""
        near, far = pair()
        return cls(near, far=far)

    def when_there(self, callback: Callable[[], object]) -> None:
        """Call `callback` once it is there, before it hears anything; at once, where it is there already."""
        if self.is_there:
            callback()
        else:
            self._when_there.append(callback)

    def arrive(self, pidfd: int, give: Callable[[socket.socket], object] = lambda _: None) -> None:
        """Take note that it is there, and `give` it its end of the socket. It must be wanted still."""
        far, self.far = self.far, None
        assert far is not None  # noqa: S101 - it is wanted
        with far:
            self.is_there, self.pidfd, self.pid = True, pidfd, _pid_of(pidfd)
            (boost if self._is_boosted else unboost)(self.pid)
            if self._loop is not None:
                self._loop.add(pidfd, self._on_end)
            callbacks, self._when_there = self._when_there, []
            for callback in callbacks:
                callback()
            give(far)

    def give_up(self, sentence: str) -> None:
        """Let it never be there, for which `sentence` is the reason; nothing where it is."""
        if self.far is None:
            return
        self.far.close()
        self.far = None
        self._why_not, self._when_there = sentence, []
        if self._loop is not None:
            self._loop.call_soon(self._tell_end)

    def watch(self, loop: Reactor, on_end: Callable[[], object]) -> None:
        """Have `on_end` called by the loop once it has ended, or will never be there."""
        self._loop, self._on_end = loop, on_end
        if self.is_there:
            loop.add(self.pidfd, on_end)
        elif self.far is None:
            loop.call_soon(self._tell_end)

    def unwatch(self) -> None:
        """Take that back."""
        loop, self._loop = self._loop, None
        if loop is not None and self.is_there:
            loop.remove(self.pidfd)

    def boost(self) -> None:
        """Let it come before what else the host does, from when it is there."""
        self._is_boosted = True
        boost(self.pid)

    def unboost(self) -> None:
        """Let it have its turn as any process has."""
        self._is_boosted = False
        unboost(self.pid)

    def kill(self) -> None:
        """Kill it; whoever waits for its end hears of it."""
        if self.pidfd >= 0:
            kill(self.pidfd)
        self.give_up("the worker was not needed any more")

    def _tell_end(self) -> None:
        if self._loop is not None:
            self._on_end()

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
            return self._why_not or "the worker has ended"
        if end.si_code == os.CLD_EXITED:
            return f"the worker ended unexpectedly with exit status {end.si_status}"
        return f"the worker was ended by {signal.Signals(end.si_status).name}"

    def _collect(self) -> os.waitid_result | None:
        if self.pidfd < 0:
            self.leave()
            return None
        try:
            return os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        except ChildProcessError:  # it is an earlier service's
            return None
        finally:
            self.leave()

    def leave(self) -> None:
        """Close both descriptors; somebody else may have them too. One that is not there yet never is."""
        self.unwatch()
        self.give_up("nobody waits for it")
        self.socket.close()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def start(command: Sequence[str]) -> Process:
    """Start a program that gets the number of its end of the socket after ``--socket``. Raises: KernelError."""
    process = Process.to_come()
    try:
        start_as(process, command)
    except KernelError:
        process.leave()
        raise
    return process


def start_as(process: Process, command: Sequence[str]) -> None:
    """Start a program as a process that is not there yet and is wanted; see `start`.

    Raises: KernelError, and then it never is.
    """
    far = process.far
    assert far is not None  # noqa: S101 - it is wanted
    try:
        # A session of its own: a Ctrl-C meant for the service must not end the workers before they are drained.
        child = subprocess.Popen(  # noqa: S603 - the command is ours
            [*command, "--socket", str(far.fileno())],
            pass_fds=[far.fileno()],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        pidfd = _watched(child)
    except OSError as error:
        problem = KernelError("start a worker process", error.errno or errno.EIO)
        process.give_up(str(problem))
        raise problem from None
    child.returncode = 0  # `Process` waits for it
    process.arrive(pidfd)


def _watched(child: subprocess.Popen[bytes]) -> int:
    """Return a child's pidfd; one of which there is none to be had is ended, as nobody could. Raises: OSError."""
    try:
        return os.pidfd_open(child.pid)
    except OSError:
        child.kill()
        child.wait()
        raise


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
