"""How often workers have died one after the other, how long to wait before the next one, and when to give up.

Must not start anything, nor read a clock.

A worker that died after the guest had got an answer is followed at once. One that died in vain is followed later each
time, and after the last time not at all: a request that kills whoever touches it must not keep the host busy for ever.
The worker itself says what the guest got. So those that die hastily, many in a row, are followed later all the same.
"""

from __future__ import annotations

HASTY_S = 1.0  # before one that follows a hasty death
REST_S = (0.0, 0.1, 0.3, 1.0, 2.0, 5.0)  # before the next worker, by how many have died in vain


class Backoff:
    """The count.

    deaths   in a row
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
        """Count a worker that could not serve the disk: that is tried again for ever."""
        self._failures = min(self._failures + 1, len(REST_S))
        self.rest_s = REST_S[self._failures - 1]

    def served(self) -> None:
        """Forget the failures: a worker serves. Whether it does so for long is still to be seen."""
        self._failures = 0

    def forget(self) -> None:
        """Begin anew."""
        self.rest_s = 0.0
        self.deaths = self._failures = 0
