"""The lines of the service's log that are about one vbd, within a budget: a guest can provoke some of them.

Must not decide what is worth a line.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.budget import Bucket
from xenbackend.log import get_logger
from xenbackend.supervisor.xenstore.paths import VbdPath

# What is lost where a service ends before it could put it right.
UNTOLD = "xenstore could not be told which chain was in service; name it in params before the disk is served again"
UNFINISHED = "what the guest waits for could not be done before the service ended; restart the guest"
_BURST, _INTERVAL_S = 50, 30.0  # lines per vbd: what a guest can provoke stays below 64 KiB an hour
_OWN = {"event", "vbd", "component"}  # fields that a worker's must not stand in for


class VbdLog:
    """Writes lines."""

    def __init__(self, path: VbdPath, now: Callable[[], float]) -> None:
        """`now` is a clock in seconds that only goes forward."""
        self._log = get_logger("supervisor", vbd=path.disk)
        self._budget = Bucket(_BURST, _INTERVAL_S, now)

    def say(self, level: str, event: str, **fields: str) -> None:
        """Write a line, unless there were too many; how many were not written stands in the next one."""
        held_back = self._budget.take()
        if held_back is None:
            return
        if held_back:
            fields = {**fields, "lines_held_back": str(held_back)}
        getattr(self._log, level)(event, **{key: value for key, value in fields.items() if key not in _OWN})
