"""A budget for what others can provoke, such as lines in a log.

Must not know what the budget is spent on.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Bucket:
    """A token bucket that also counts the requests that it has refused.

    Args:
        burst: how many tokens the bucket holds; it starts full.
        refill_s: seconds until another token is added.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, burst: int, refill_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._refill_s = refill_s
        self._now = now
        self._left = float(burst)
        self._refilled = now()
        self._refused = 0

    def take(self) -> int | None:
        """Take a token. Return how many requests were refused since the last token, or None if this one is refused."""
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
        """Charge `more` tokens for the request just granted. The balance may go negative; later requests pay it off."""
        self._left -= more
