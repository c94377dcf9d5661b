"""Worker processes: start, talk, end, reap.

Must not know xenstore, nor what a message means to a vbd.

A worker is started by exec and never forked from here. It gets one end of a datagram socket pair; messages in
`xenbackend.control` travel over it, descriptors beside them. A pidfd tells when it has ended, so that no signal handler
is needed and no process number can be mistaken for its successor's.
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
from functools import partial

from xenbackend import control
from xenbackend.errors import KernelError
from xenbackend.supervisor.memories import Memories

COMMAND = (sys.executable, "-m", "xenbackend.worker.main")
_MESSAGES_PER_TURN = 64  # so that one talkative worker does not hold up the others

OnMessage = Callable[[control.Message], None]
OnEnd = Callable[[str], None]


class Worker:
    """One process and the supervisor's end of its socket."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        command: Sequence[str],
        on_message: OnMessage,
        on_end: OnEnd,
        memories: Memories,
    ) -> None:
        """Start the process; what it wants kept goes to `memories`. Raises: KernelError."""
        self._selector = selector
        self._on_message = on_message
        self._on_end = on_end
        self._why_killed = ""
        self._memories = memories
        with ExitStack() as undo:
            try:
                near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.callback(near.close)
                with far:
                    self._process = _start(command, far)
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                raise KernelError("start a worker process", error.errno or errno.EIO) from None
            undo.pop_all()
        near.setblocking(False)
        self._socket = near
        selector.register(near, selectors.EVENT_READ, self._receive)
        selector.register(self._pidfd, selectors.EVENT_READ, self._reap)

    @property
    def pid(self) -> int:
        """The process number, for people."""
        return self._process.pid

    def send(self, message: control.Message, fds: Sequence[int] = ()) -> None:
        """Send a message. A worker that does not read is killed: it would never do what was asked."""
        try:
            socket.send_fds(self._socket, [control.encode(message)], list(fds))
        except BlockingIOError:
            self.kill("the worker was killed: it does not read its messages")
        except OSError:
            pass  # it is ending; `_reap` will tell

    def kill(self, sentence: str) -> None:
        """Kill the process; `on_end` gets the sentence once it is gone."""
        self._why_killed = self._why_killed or sentence
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _receive(self) -> None:
        """Hand on what the worker said."""
        for _ in range(_MESSAGES_PER_TURN):
            try:
                datagram, fds, _flags, _ = socket.recv_fds(self._socket, control.MAX_MESSAGE, 1)
            except BlockingIOError:
                return
            except OSError:
                datagram, fds = b"", []
            if not datagram:
                self._selector.unregister(self._socket)  # the process ends or is about to
                return
            self._take(datagram, fds)

    def _take(self, datagram: bytes, fds: list[int]) -> None:
        try:
            message = control.decode(datagram)
        except (ValueError, TypeError):
            message = None
        if isinstance(message, control.Keep) and fds:
            self._memories.keep(message.name, fds.pop())
        for fd in fds:
            os.close(fd)
        if message is None:
            self.kill("the worker was killed: it sent something that is no message")
        else:
            self._on_message(message)

    def _reap(self) -> None:
        """Take the last messages, collect the exit status, let go of everything, and tell."""
        if self._socket in self._selector.get_map():
            self._receive()
        if self._socket in self._selector.get_map():
            self._selector.unregister(self._socket)
        self._selector.unregister(self._pidfd)
        status = self._process.wait()
        self._socket.close()
        sentence = self._why_killed or _describe_end(status)
        os.close(self._pidfd)
        self._on_end(sentence)


class Fleet:
    """All worker processes of this service. `command` is a worker's command line, without ``--socket``."""

    def __init__(self, selector: selectors.BaseSelector, command: Sequence[str] = COMMAND) -> None:
        self.start: Callable[[OnMessage, OnEnd, Memories], Worker] = partial(Worker, selector, command)


def _start(command: Sequence[str], far: socket.socket) -> subprocess.Popen[bytes]:
    # A session of its own: a Ctrl-C meant for the service must not end the workers before they are drained.
    return subprocess.Popen(  # noqa: S603 - the command is ours
        [*command, "--socket", str(far.fileno())],
        pass_fds=[far.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _describe_end(status: int) -> str:
    if status < 0:
        return f"the worker was ended by {signal.Signals(-status).name}"
    return f"the worker ended unexpectedly with exit status {status}"
