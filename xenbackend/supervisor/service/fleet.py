"""Worker processes: start, talk, end, reap; and those that an earlier service started.

Must not know xenstore, nor what a message means to a vbd.

A worker is forked from the zygote, or started by exec where there is none; never forked from here. It gets one end of a
datagram socket pair; messages in `xenbackend.protocol.messages` travel over it, descriptors beside them.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
from collections.abc import Callable, Sequence

from xenbackend.protocol import messages
from xenbackend.supervisor.service import process
from xenbackend.supervisor.service.process import Process
from xenbackend.supervisor.service.zygote import Zygote

COMMAND = (sys.executable, "-m", "xenbackend.worker.main")
_REST_S = 5.0  # after a zygote that has ended
_MESSAGES_PER_TURN = 64  # so that one talkative worker does not hold up the others

OnMessage = Callable[[messages.Message, list[int]], None]  # with the descriptors beside it, the callee's to close
OnEnd = Callable[[str], None]


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

    def send(self, message: messages.Message, fds: Sequence[int] = ()) -> None:
        """Send a message. A worker that does not read is killed: it would never do what was asked."""
        try:
            socket.send_fds(self._process.socket, [messages.encode(message)], list(fds))
        except BlockingIOError:
            self.kill("the worker was killed: it does not read its messages")
        except OSError:
            pass  # it is ending; `_reap` will tell

    def kill(self, sentence: str) -> None:
        """Kill the process; `on_end` gets the sentence once it is gone."""
        self._why_killed = self._why_killed or sentence
        self._process.kill()

    def boost(self) -> None:
        """Let it come before what else the host does, until `unboost`: a guest waits for it."""
        self._process.boost()

    def unboost(self) -> None:
        """Let it have its turn as any process has."""
        self._process.unboost()

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
                datagram, fds, _flags, _ = socket.recv_fds(self._process.socket, messages.MAX_MESSAGE, 1)
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
        message: messages.Message
        try:
            message = messages.decode(datagram)
        except messages.UnknownKind as error:  # of another program than ours: it was inherited
            message = messages.Log("warning", f"the worker said what this service does not know: {error}", {})
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
    """All worker processes of this service."""

    def __init__(
        self, selector: selectors.BaseSelector, command: Sequence[str] = COMMAND, zygote: Sequence[str] = ()
    ) -> None:
        """Start nothing yet; the command lines of a worker and of a zygote are without ``--socket``.

        Without a zygote's every worker is started by exec.
        """
        self._selector = selector
        self._command = command
        self._zygote_command = zygote
        self._zygote: Zygote | None = None
        self._rest_until = 0.0

    def start(self, on_message: OnMessage, on_end: OnEnd) -> Worker:
        """Start a worker. Raises: KernelError."""
        forked = self._zygote.fork() if self._zygote else None
        return Worker(self._selector, forked or process.start(self._command), on_message, on_end)

    def adopt(self, fds: tuple[int, int], on_message: OnMessage, on_end: OnEnd) -> Worker:
        """Go on with a worker that an earlier service started, by its `Worker.descriptors`."""
        return Worker(self._selector, Process(socket.socket(fileno=fds[0]), fds[1]), on_message, on_end)

    def prepare(self, now: float) -> None:
        """Have a zygote, so that the next worker starts fast; one that has ended is not replaced at once.

        Raises: KernelError.
        """
        if self._zygote is not None and self._zygote.has_ended():
            self.close()
            self._rest_until = now + _REST_S
        if self._zygote_command and self._zygote is None and now >= self._rest_until:
            self._zygote = Zygote(self._zygote_command)

    def close(self) -> None:
        """Send the zygote away; `prepare` starts another one, of the program as it is then."""
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            zygote.close()
