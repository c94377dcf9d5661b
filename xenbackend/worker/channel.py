"""What a worker says to its supervisor: answers, log lines within a budget, memories to keep.

Must not let a guest fill the log: lines come out of buckets that refill slowly, complaints about a guest out of one,
alarms out of another, because a guest may find out how to raise them.
"""

from __future__ import annotations

import socket
import time
from array import array
from contextlib import suppress
from typing import Protocol

from xenbackend.protocol import messages

BURST = 10  # lines before a bucket is empty
REFILL_S = 60.0  # seconds for one more; with lines of some 100 bytes a guest makes at most 8 KiB of log an hour
LINE = 400  # characters of a complaint
ALARM = 4000  # characters of an alarm: a traceback fits


class Voice(Protocol):
    """Whoever hears what happens to a connection: the supervisor, in the end."""

    def say(self, message: messages.Message) -> None:
        """Say what has become of the rings."""

    def complain(self, sentence: str) -> None:
        """Say something that a guest provoked."""

    def alarm(self, sentence: str) -> None:
        """Say something that an administrator must read."""


class Bucket:
    """A budget of lines. `take` gives None where it is spent, else how many were left unsaid before."""

    def __init__(self) -> None:
        self._left = float(BURST)
        self._refilled = time.monotonic()
        self._unsaid = 0

    def take(self) -> int | None:
        """Take one line out."""
        now = time.monotonic()
        self._left = min(BURST, self._left + (now - self._refilled) / REFILL_S)
        self._refilled = now
        if self._left < 1:
            self._unsaid += 1
            return None
        self._left -= 1
        unsaid, self._unsaid = self._unsaid, 0
        return unsaid


class Channel:
    """One end of the supervisor's socket, for sending."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._complaints = Bucket()
        self._alarms = Bucket()

    def say(self, message: messages.Message) -> None:
        """Send a message."""
        self._send(message)

    def keep(self, name: str, size: int, fd: int) -> None:
        """Hand over a memory that a successor is to get."""
        self._send(messages.Keep(name, size), fd)

    def drop(self, name: str) -> None:
        """Say that a memory is wanted no more."""
        self._send(messages.Drop(name))

    def complain(self, sentence: str) -> None:
        """Say something that a guest provoked, while the budget lasts; what was left unsaid is counted."""
        self._log(self._complaints, "warning", ascii(sentence)[1:-1][:LINE])

    def alarm(self, sentence: str) -> None:
        """Say something that an administrator must read."""
        self._log(self._alarms, "critical", sentence[:ALARM])

    def _log(self, bucket: Bucket, level: str, sentence: str) -> None:
        unsaid = bucket.take()
        if unsaid is not None:
            self._send(messages.Log(level, sentence, {"unsaid": str(unsaid)} if unsaid else {}))

    def _send(self, message: messages.Message, *fds: int) -> None:
        """Send a message with the descriptors that belong to it; lost where nobody listens.

        Whoever serves a guest must not wait for that: a supervisor that has gone tells the loop by its socket, and one
        that comes again asks where we stand.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        with suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            # Not `socket.send_fds`, which drops the flags that it is given, and so would wait.
            self._channel.sendmsg([messages.encode(message)], rights, socket.MSG_DONTWAIT)
