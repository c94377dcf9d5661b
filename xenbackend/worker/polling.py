"""Looking for the next request for a moment before going to sleep.

Must not burn a CPU that somebody else wants, nor one that finds nothing: it gives up for a while when it was in vain,
and altogether while the host has no idle CPU.

Why: to sleep and be woken costs 25 to 30 us on both sides, as much as serving ten requests. A guest that waits for one
answer before it sends the next request is back within that time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns

from xenbackend.blkif.ring import BackRing

POLL_US = 60  # by default: a guest that sleeps needs about 40 to wake, see its answer and ask again
_PATIENCE = 8  # looks in vain, one after the other, before it gives up for a while
_PAUSE = 256  # sleeps without a look after that


class Poller:
    """Decides whether to look, and does it. `is_allowed` is false while the host has no idle CPU."""

    def __init__(self, duration_ns: int, clock: Callable[[], int] = perf_counter_ns) -> None:
        """Look for `duration_ns` at most; 0 is never."""
        self.is_allowed = True
        self._duration_ns = duration_ns
        self._clock = clock
        self._in_vain = 0
        self._pause = 0 if duration_ns else 1

    def may_look(self) -> bool:
        """True unless a look would be one too many now; each question counts towards the end of a pause."""
        if self._pause and self._duration_ns:
            self._pause -= 1
            return False
        return self.is_allowed and not self._pause

    def finds_work(self, ring: BackRing, others: Sequence[BackRing]) -> bool:
        """True as soon as `ring` has a request; False when time is up or one of the `others` has one."""
        if not self.may_look():
            return False
        clock = self._clock
        end = clock() + self._duration_ns
        while clock() < end:
            for other in others:
                if other.has_moved():  # first: its guest waits for us, not for us to be done with this one
                    return False
            if ring.has_moved():
                self._in_vain = 0
                return True
        self._in_vain += 1
        if self._in_vain >= _PATIENCE:
            self._in_vain = 0
            self._pause = _PAUSE
        return False
