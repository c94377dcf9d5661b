"""A process of ours, with a socket to it and a pidfd that reports its end; how one is started by exec.

Must not know what is said over the socket, nor wait until a process is there: it can be talked to, and given up, before
that. Messages wait in the socket until then, and nobody else has its other end. So a process that is not wanted any
more when it comes has heard nothing.

A pidfd needs no signal handler, and cannot mean a later process with the same number.
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

# CREDENTIALS_DIRECTORY tells an opener where passphrases are, systemd.exec(5).
_TOLD = {"CREDENTIALS_DIRECTORY", "PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}


class Process:
    """Our hold on a process, which need not be our child, and need not be there yet.

    socket      our end; messages wait in it until the process is there
    is_there    whether it was started, even if it has ended since
    pidfd       readable once it has ended; -1 before it is there, and after `leave`
    pid         its number, for people; 0 before it is there
    far         its end of the socket, while it is not there yet and still wanted; else None
    """

    def __init__(self, near: socket.socket, pidfd: int = -1, far: socket.socket | None = None) -> None:
        """Hold a process by its pidfd, or one that will be given `far`, which is ours until then."""
        self.socket = near
        self.is_there = pidfd >= 0
        self.pidfd = pidfd
        self.pid = _pid_of(pidfd) if self.is_there else 0
        self.far = far
        self._why_not = ""
        self._is_watched = False
        self._is_boosted = False
        self._loop: Reactor | None = None
        self._on_end: Callable[[], object] = int
        self._when_there: list[Callable[[], object]] = []
        near.setblocking(False)

    @classmethod
    def to_come(cls) -> Process:
        """Return a process that is not there yet. Raises: KernelError."""
        near, far = pair()
        return cls(near, far=far)

    def when_there(self, callback: Callable[[], object]) -> None:
        """Call `callback` once it is there, before it hears anything; at once if it is there already."""
        if self.is_there:
            callback()
        else:
            self._when_there.append(callback)

    def arrive(self, pidfd: int, give: Callable[[socket.socket], object] = lambda _: None) -> None:
        """Note that it is there, and `give` it its end of the socket. It must still be wanted."""
        far, self.far = self.far, None
        assert far is not None  # noqa: S101 - it is wanted
        with far:
            self.is_there, self.pidfd, self.pid = True, pidfd, _pid_of(pidfd)
            (boost if self._is_boosted else unboost)(self.pid)
            if self._loop is not None:
                self._watch_or_kill(self._loop)
            callbacks, self._when_there = self._when_there, []
            for callback in callbacks:
                callback()
            give(far)

    def _watch_or_kill(self, loop: Reactor) -> None:
        """Watch it; kill it if the host has no room for that, since nobody would notice its end."""
        try:
            loop.add(self.pidfd, self._on_end)
            self._is_watched = True
        except OSError as error:
            self._why_not = f"the worker was killed: it cannot be watched: {error.strerror}"
            kill(self.pidfd)
            loop.call_soon(self._tell_end)

    def give_up(self, sentence: str) -> None:
        """Give up a process that is not there yet; `sentence` says why. Does nothing if it is there."""
        if self.far is None:
            return
        self.far.close()
        self.far = None
        self._why_not, self._when_there = sentence, []
        if self._loop is not None:
            self._loop.call_soon(self._tell_end)

    def watch(self, loop: Reactor, on_end: Callable[[], object]) -> None:
        """Have the loop call `on_end` once it has ended, or has been given up. Raises: OSError."""
        if self.is_there:
            loop.add(self.pidfd, on_end)
            self._is_watched = True
        elif self.far is None:
            loop.call_soon(self._tell_end)
        self._loop, self._on_end = loop, on_end

    def unwatch(self) -> None:
        """Undo `watch`."""
        loop, self._loop = self._loop, None
        if loop is not None and self._is_watched:
            self._is_watched = False
            loop.remove(self.pidfd)

    def boost(self) -> None:
        """Give it priority over the rest of the host, from when it is there."""
        self._is_boosted = True
        boost(self.pid)

    def unboost(self) -> None:
        """Give it the priority of any other process again."""
        self._is_boosted = False
        unboost(self.pid)

    def kill(self) -> None:
        """Kill it, or give it up; what `watch` set is called."""
        if self.pidfd >= 0:
            kill(self.pidfd)
        self.give_up("the worker was no longer needed")

    def _tell_end(self) -> None:
        if self._loop is not None:
            self._on_end()

    def wait(self) -> int:
        """Wait for the end, close both descriptors, and return the exit status; negative: a signal, or unknown."""
        end = self._collect()
        if end is None:
            return -1
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def describe_end(self) -> str:
        """Wait for the end, collect the exit status if it is our child, close both descriptors; return how it ended."""
        end = self._collect()
        if end is None or self._why_not:
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
        except ChildProcessError:  # it is an earlier service's child
            return None
        finally:
            self.leave()

    def leave(self) -> None:
        """Close both descriptors, of which others may have copies. One that is not there yet is given up."""
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
    """Start a program as a process that is not there yet and is still wanted; see `start`.

    Raises: KernelError; then the process is given up.
    """
    far = process.far
    assert far is not None  # noqa: S101 - it is wanted
    try:
        # A session of its own: a Ctrl-C for the service must not end workers that have not finished what is in flight.
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
    """Return a child's pidfd. A child without one is killed, since nobody could do so later. Raises: OSError."""
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
    """Return what our processes get of our environment: where Python and its parts are, nothing about the service."""
    return {name: value for name, value in os.environ.items() if name in _TOLD or name.startswith("PYTHON")}


def _pid_of(pidfd: int) -> int:
    """Return the number of the process behind a pidfd; 0 if it is gone, or if we have no descriptor left to look."""
    with suppress(OSError):
        for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key == "Pid":
                return max(0, int(value))
    return 0
