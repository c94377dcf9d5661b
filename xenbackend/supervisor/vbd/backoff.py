"""How often workers have died one after the other, how long to wait before the next one, and when to give up.

Must not start anything, nor read a clock.

A worker that died after the guest had received an answer gets a successor at once. When workers die in vain, one after
the other, each successor waits longer, and finally there is none: a request that kills every worker must not keep the
host busy for ever. What the guest received is recorded by the worker itself. So if many workers in a row die hastily,
right after their start, the next one waits in any case.
"""

from __future__ import annotations

HASTY_S = 1.0  # shortest wait after a hasty death
REST_S = (0.0, 0.1, 0.3, 1.0, 2.0, 5.0)  # wait before the next worker, by the number of deaths in a row


class Backoff:
    """Counts the deaths and failures of one vbd's workers.

    deaths   in a row, of which at most the first one was not in vain
    rest_s   seconds before the next worker
    """

    deaths: int
    rest_s: float
    _failures: int

    def __init__(self) -> None:
        self.forget()

    def died(self, *, in_vain: bool, is_hasty: bool = False) -> bool:
        """Count a worker's death, and return whether another worker should follow."""
        self.deaths = self.deaths + 1 if in_vain else 1
        has_next = self.deaths <= len(REST_S)
        if has_next:
            self.rest_s = max(REST_S[self.deaths - 1], HASTY_S if is_hasty else 0.0)
        return has_next

    def failed(self) -> None:
        """Count a worker that could not serve the disk. Serving is tried again for ever."""
        self._failures = min(self._failures + 1, len(REST_S))
        self.rest_s = REST_S[self._failures - 1]

    def served(self) -> None:
        """Forget the failures, because a worker serves. Deaths still count: it may not live long."""
        self._failures = 0

    def forget(self) -> None:
        """Forget all deaths and failures."""
        self.rest_s = 0.0
        self.deaths = self._failures = 0
