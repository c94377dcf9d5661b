"""Worker processes: start, talk, end, reap; and those that an earlier service started.

Must not know xenstore, nor what a message means to a vbd.

A worker is started by exec and never forked from here. It gets one end of a datagram socket pair; messages in
`xenbackend.control` travel over it, descriptors beside them. A pidfd tells when it has ended, so that no signal handler
is needed and no process number can be mistaken for its successor's.

One worker more than there are vbds stands by, with everything imported: whoever needs one has it at once.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from xenbackend import control
from xenbackend.errors import KernelError

COMMAND = (sys.executable, "-m", "xenbackend.worker.main")
_REST_S = 5.0  # after a worker that stood by has ended by itself
_MESSAGES_PER_TURN = 64  # so that one talkative worker does not hold up the others

OnMessage = Callable[[control.Message, list[int]], None]  # with the descriptors beside it, the callee's to close
OnEnd = Callable[[str], None]


class Process:
    """A worker's process as somebody holds it who may not be its parent.

    socket      our end
    pidfd       readable once it has ended
    pid         its number, for people
    """

    def __init__(self, near: socket.socket, pidfd: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.socket = near
        self.pidfd = pidfd
        self.pid = child.pid if child else _pid_of(pidfd)
        self._child = child
        near.setblocking(False)

    def describe_end(self) -> str:
        """Collect the exit status where we may, close both descriptors, and return how it ended."""
        status = self._child.wait() if self._child else None
        self.socket.close()
        os.close(self.pidfd)
        if status is None:
            return "the worker has ended"
        if status < 0:
            return f"the worker was ended by {signal.Signals(-status).name}"
        return f"the worker ended unexpectedly with exit status {status}"

    def leave(self) -> None:
        """Close both descriptors; somebody else has them too."""
        if self._child is not None:
            self._child.returncode = 0  # it will not be waited for, and that is no mistake
        self.socket.close()
        os.close(self.pidfd)


class Worker:
    """One process that serves a vbd."""

    def __init__(
        self, selector: selectors.BaseSelector, process: Process, on_message: OnMessage, on_end: OnEnd
    ) -> None:
        """Listen to it from now on."""
        self._selector = selector
        self._on_message = on_message
        self._on_end = on_end
        self._why_killed = ""
        self._process = process
        selector.register(process.socket, selectors.EVENT_READ, self._receive)
        selector.register(process.pidfd, selectors.EVENT_READ, self._reap)

    @property
    def pid(self) -> int:
        """The process number, for people."""
        return self._process.pid

    @property
    def descriptors(self) -> tuple[int, int]:
        """The socket and the pidfd, by which another service can talk to it."""
        return self._process.socket.fileno(), self._process.pidfd

    def send(self, message: control.Message, fds: Sequence[int] = ()) -> None:
        """Send a message. A worker that does not read is killed: it would never do what was asked."""
        try:
            socket.send_fds(self._process.socket, [control.encode(message)], list(fds))
        except BlockingIOError:
            self.kill("the worker was killed: it does not read its messages")
        except OSError:
            pass  # it is ending; `_reap` will tell

    def kill(self, sentence: str) -> None:
        """Kill the process; `on_end` gets the sentence once it is gone."""
        self._why_killed = self._why_killed or sentence
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process.pidfd, signal.SIGKILL)

    def leave(self) -> None:
        """Let go of the worker, which goes on: the keeper has its socket for the next service."""
        for each in (self._process.socket, self._process.pidfd):
            if each in self._selector.get_map():
                self._selector.unregister(each)
        self._process.leave()

    def _receive(self) -> None:
        """Hand on what the worker said."""
        for _ in range(_MESSAGES_PER_TURN):
            try:
                datagram, fds, _flags, _ = socket.recv_fds(self._process.socket, control.MAX_MESSAGE, 1)
            except BlockingIOError:
                return
            except OSError:
                datagram, fds = b"", []
            if not datagram:
                self._selector.unregister(self._process.socket)  # the process ends or is about to
                return
            self._take(datagram, fds)
            if self._process.socket.fileno() < 0:
                return  # it was left while its message was handled

    def _take(self, datagram: bytes, fds: list[int]) -> None:
        message: control.Message
        try:
            message = control.decode(datagram)
        except control.UnknownKind as error:  # of another program than ours: it was inherited
            message = control.Log("warning", f"the worker said what this service does not know: {error}", {})
        except ValueError:
            for fd in fds:
                os.close(fd)
            self.kill("the worker was killed: it sent something that is no message")
            return
        self._on_message(message, fds)

    def _reap(self) -> None:
        """Take the last messages, collect the exit status, let go of everything, and tell."""
        near = self._process.socket
        if near in self._selector.get_map():
            self._receive()
        if near.fileno() >= 0 and near in self._selector.get_map():
            self._selector.unregister(near)
        self._selector.unregister(self._process.pidfd)
        sentence = self._process.describe_end()
        self._on_end(self._why_killed or sentence)


class Fleet:
    """All worker processes of this service. `command` is a worker's command line, without ``--socket``."""

    def __init__(self, selector: selectors.BaseSelector, command: Sequence[str] = COMMAND, *, spares: int = 1) -> None:
        """Start nothing yet; `spares` workers stand by once `stand_by` was called."""
        self._selector = selector
        self._command = command
        self._spares: list[Process] = []
        self._wanted_spares = spares
        self._rest_until = 0.0

    def start(self, on_message: OnMessage, on_end: OnEnd) -> Worker:
        """Start a worker, or take one that stands by. Raises: KernelError."""
        process = self._spares.pop() if self._spares else _start(self._command)
        return Worker(self._selector, process, on_message, on_end)

    def adopt(self, fds: tuple[int, int], on_message: OnMessage, on_end: OnEnd) -> Worker:
        """Go on with a worker that an earlier service started, by its `Worker.descriptors`."""
        return Worker(self._selector, Process(socket.socket(fileno=fds[0]), fds[1]), on_message, on_end)

    def stand_by(self, now: float) -> None:
        """Have as many workers stand by as are wanted; those that end by themselves are not replaced at once.

        Raises: KernelError.
        """
        for each in [each for each in self._spares if _has_ended(each)]:
            self._spares.remove(each)
            each.describe_end()
            self._rest_until = now + _REST_S
        while len(self._spares) < self._wanted_spares and now >= self._rest_until:
            self._spares.append(_start(self._command))

    def close(self) -> None:
        """Send those away that stand by."""
        while self._spares:
            process = self._spares.pop()
            with suppress(ProcessLookupError):  # it has nothing open, and need not be waited for to say so
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
            process.describe_end()


def _start(command: Sequence[str]) -> Process:
    with ExitStack() as undo:
        try:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(near.close)
            with far:
                # A session of its own: a Ctrl-C meant for the service must not end the workers before they are drained.
                child = subprocess.Popen(  # noqa: S603 - the command is ours
                    [*command, "--socket", str(far.fileno())],
                    pass_fds=[far.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            process = Process(near, os.pidfd_open(child.pid), child)
        except OSError as error:
            raise KernelError("start a worker process", error.errno or errno.EIO) from None
        undo.pop_all()
    return process


def _has_ended(process: Process) -> bool:
    with selectors.PollSelector() as selector:
        selector.register(process.pidfd, selectors.EVENT_READ)
        return bool(selector.select(0))


def _pid_of(pidfd: int) -> int:
    """Return the number of the process behind a pidfd; 0 once it is gone."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "Pid":
            return max(0, int(value))
    return 0
