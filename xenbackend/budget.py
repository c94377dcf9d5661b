"""A budget of what somebody else can provoke, such as lines in a log.

Must not know what is spent.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Bucket:
    """A token bucket: so many at once, one more each time that it refills, and a count of those that came in vain.

    Args:
        burst: how many at once.
        refill_s: seconds for one more.
        now: a clock in seconds that only goes forward.
    """

    def __init__(self, burst: int, refill_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._refill_s = refill_s
        self._now = now
        self._left = float(burst)
        self._refilled = now()
        self._refused = 0

    def take(self) -> int | None:
        """Take one; return how many were refused since the one before, or None where this one is refused, too."""
        now = self._now()
        self._left = min(self._burst, self._left + (now - self._refilled) / self._refill_s)
        self._refilled = now
        if self._left < 1:
            self._refused += 1
            return None
        self._left -= 1
        refused, self._refused = self._refused, 0
        return refused

    def spend(self, more: float) -> None:
        """Take what the one just taken has turned out to cost beyond one; the next ones wait until that is paid off."""
        self._left -= more
