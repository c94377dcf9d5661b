"""What a worker says to its supervisor: answers, log lines within a budget, memories to keep.

Must not let a guest fill the log: lines about a guest come out of a bucket that refills slowly.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress

from xenbackend import control

BURST = 10  # lines about a guest before the bucket is empty
REFILL_S = 60.0  # seconds for one more; with lines of some 100 bytes a guest makes at most 8 KiB of log an hour
LINE = 400  # characters


class Speech:
    """One end of the supervisor's socket, for sending."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._budget = float(BURST)
        self._refilled = time.monotonic()
        self._unsaid = 0

    def say(self, message: control.Message, *fds: int) -> None:
        """Send a message with the descriptors that belong to it; lost where nobody listens any more.

        Whoever drains and closes must not be stopped by that: the loop learns from the socket that it has to end.
        """
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._channel, [control.encode(message)], fds)

    def keep(self, name: str, size: int, fd: int) -> None:
        """Hand over a memory that a successor is to get."""
        self.say(control.Keep(name, size), fd)

    def complain(self, sentence: str) -> None:
        """Say something that a guest provoked, while the budget lasts; what was left unsaid is counted."""
        now = time.monotonic()
        self._budget = min(BURST, self._budget + (now - self._refilled) / REFILL_S)
        self._refilled = now
        if self._budget < 1:
            self._unsaid += 1
            return
        self._budget -= 1
        unsaid, self._unsaid = self._unsaid, 0
        fields = {"unsaid": str(unsaid)} if unsaid else {}
        self.say(control.Log("warning", ascii(sentence)[1:-1][:LINE], fields))

    def alarm(self, sentence: str) -> None:
        """Say something that an administrator must read."""
        self.say(control.Log("critical", sentence, {}))
