"""The lines of the service's log that are about one vbd, within a budget: a guest can provoke some of them.

Must not decide what is worth a line.

The budget counts the bytes that are written, after everything in a line has been escaped. The worker's lines have a
budget of their own, so that a worker that a guest has taken over does not silence what we say about it.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.budget import Bucket
from xenbackend.log import LEVELS, get_logger
from xenbackend.supervisor.xenstore.paths import VbdPath

# What is lost if a service ends before it could put things right.
UNTOLD = "xenstore could not be told which chain was in service; name it in params before the disk is served again"
UNFINISHED = "the requests that the guest waits for could not be done before the service ended; restart the guest"
LOST = "what the guest had written was in an unnamed file, which is deleted with the service; detach the disk"
PER_HOUR = 64 * 1024  # bytes, at most, in any hour
_LONGEST_LINE = 8 * 1024  # bytes: two texts of 500 characters of up to four bytes each, and the rest of the line
_BURST = PER_HOUR // 4 - _LONGEST_LINE // 2  # at once, and as many again during the hour, for each of the two budgets
_OWN = {"event", "vbd", "component"}  # fields that a worker must not set


class VbdLog:
    """Writes the log's lines about one vbd."""

    def __init__(self, path: VbdPath, now: Callable[[], float]) -> None:
        """`now` is a clock in seconds that only goes forward."""
        self._log = get_logger("supervisor", vbd=path.disk)
        self._ours, self._workers = (Bucket(_BURST, 3600 / _BURST, now) for _ in range(2))

    def say(self, level: str, event: str, **fields: str) -> None:
        """Write a line, unless there were too many. The next line that is written says how many were not."""
        self._say(self._ours, level, event, fields)

    def warn(self, event: str) -> None:
        """Write a warning."""
        self.say("warning", event)

    def say_for_worker(self, level: str, event: str, **fields: str) -> None:
        """Write a line that the worker asks for, within the worker's budget."""
        self._say(self._workers, level if level in LEVELS else "warning", event, fields)

    def _say(self, budget: Bucket, level: str, event: str, fields: dict[str, str]) -> None:
        held_back = budget.take()
        if held_back is None:
            return
        if held_back:
            fields = {**fields, "lines_held_back": str(held_back)}
        written = getattr(self._log, level)(event, **{key: each for key, each in fields.items() if key not in _OWN})
        budget.spend((written or 1) - 1)
