"""What a worker says to its supervisor: where it stands, replies, memories to drop, log lines within a budget.

Must not wait for a supervisor that does not read, nor let a guest fill the log: each line is taken from a budget that
refills slowly. Complaints about a guest and alarms have separate budgets, since a guest may find out how to cause them.

What the socket does not take at once is sent later, in order; of standings only the newest one is kept, and log lines
are left out. If the supervisor is gone, nothing is sent: the next one asks where the worker stands.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from xenbackend.budget import Bucket
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, messages
from xenbackend.protocol.codes import Code

BURST = 10  # lines until a budget is used up
REFILL_S = 60.0  # seconds for one more; with lines of some 100 bytes a guest makes at most 8 KiB of log an hour
LINE = 400  # characters of a complaint
RETRY_S = 0.1  # between two tries while the supervisor reads nothing
DATAGRAM_MAX = 128 * 1024  # bytes: less than any socket's buffer, and than `messages.MAX_MESSAGE`


class Reports(Protocol):
    """Takes what a connection has to report to the supervisor."""

    def stand(self) -> None:
        """Say where the worker stands, if that has changed."""

    def complain(self, sentence: str) -> None:
        """Log something that a guest provoked."""

    def alarm(self, sentence: str) -> None:
        """Log something that an administrator must read."""


class Channel:
    """One end of the supervisor's socket, for sending; `standing` returns where the worker stands."""

    def __init__(
        self, near: socket.socket, reactor: Reactor, standing: Callable[[], messages.Standing] | None = None
    ) -> None:
        """Send over `near`, a SOCK_SEQPACKET socket."""
        self._socket = near
        self._now = reactor.now
        self._standing = standing
        self._stood: messages.Standing | None = None  # the last one that was sent
        self._unsent: list[messages.Message] = []
        self._retry = reactor.timer(self._send_again)
        self._complaints = Bucket(BURST, REFILL_S, reactor.now)
        self._alarms = Bucket(BURST, REFILL_S, reactor.now)

    def stand(self) -> None:
        """Say where the worker stands, if that has changed; each order changes its number."""
        if self._standing is None:
            return
        standing = self._standing()
        if standing != self._stood:
            self._stood = standing
            self._unsent = [each for each in self._unsent if not isinstance(each, messages.Standing)]
            self._send(_fitting(standing))

    def reply(self, number: int, code: Code, sentence: str = "", data: str = "") -> None:
        """Reply to the question with this id."""
        self._send(messages.Reply(number, code, plain(sentence), data))

    def drop(self, name: str) -> None:
        """Say that no layer wants a memory any longer."""
        self._send(messages.Drop(name))

    def disconnected(self, server: str, place: int, inode: int) -> None:
        """Say that a connection to a server was closed with nothing under way, and need not be kept."""
        self._send(messages.Disconnected(server, place, inode))

    def complain(self, sentence: str) -> None:
        """Log something that a guest provoked, while the budget lasts; lines left out are counted."""
        self._log(self._complaints, "warning", ascii(sentence)[1:-1][:LINE])

    def alarm(self, sentence: str) -> None:
        """Log something that an administrator must read."""
        self._log(self._alarms, "critical", plain(sentence))

    def _log(self, bucket: Bucket, level: str, sentence: str) -> None:
        unsaid = bucket.take()
        if unsaid is not None and not self._unsent:
            self._try(messages.Log(level, sentence, unsaid))

    def _send(self, message: messages.Message) -> None:
        """Send a message, now or later."""
        if self._unsent or not self._try(message):
            self._unsent.append(message)
            self._retry.set(self._now() + RETRY_S)

    def _send_again(self) -> None:
        while self._unsent and self._try(self._unsent[0]):
            del self._unsent[0]
        if self._unsent:
            self._retry.set(self._now() + RETRY_S)

    def _try(self, message: messages.Message) -> bool:
        """Send a message; False if the socket is full. True also if the supervisor is gone."""
        try:
            self._socket.send(codec.encode(message), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass
        return True


def plain(sentence: str) -> str:
    """Return any text as a sentence that fits into a message: not longer than SENTENCE_MAX, and valid as UTF-8."""
    return sentence[: messages.SENTENCE_MAX].encode(errors="backslashreplace").decode()[: messages.SENTENCE_MAX]


def _fitting(standing: messages.Standing) -> messages.Standing:
    """Return the standing without its lowest layers, if it would not fit into a datagram with them."""
    while len(standing.layers) > 1 and len(codec.encode(standing)) > DATAGRAM_MAX:
        standing = replace(standing, layers=standing.layers[: len(standing.layers) // 2])
    return standing


def fits(data: str) -> bool:
    """Return whether a reply with these data fits into one datagram."""
    return len(codec.encode(messages.Reply(0, Code.OK, data=data))) <= DATAGRAM_MAX
