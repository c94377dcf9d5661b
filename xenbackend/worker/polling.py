"""Looks for the next request for a moment before the worker sleeps.

Must not burn CPU time in vain, nor time that somebody else wants as much as we do: looking is given up for a while if
it finds nothing, and if it costs more than it should.

Why: sleeping and being woken costs 25 to 30 us on both sides, as much as serving ten requests. A guest that waits for
one answer before it sends the next request is back within that time.

What looking costs others shows in how long we wait for the CPU. A process of our priority that wants the same CPU gets
half of it, and we wait for as long as we run. A process at nice 19 makes us wait for next to nothing, but it counts as
a runnable thread and as pressure on the CPU all the same; so neither of these figures can tell the two apart. Beside a
process of our priority a try takes some 100 ms, and tries become rare: one in half a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns

from xenbackend.blkif.ring import BackRing
from xenbackend.kernel.cpu import Cpu, CpuTimes

_PATIENCE = 8  # looks in vain in a row, after which there is a pause
_PAUSE = 256  # that many looks are left out then
_JUDGED_NS = 100_000_000  # that we run or wait before we judge: a single slice of 4 ms at nice 19 is no reason
_FORGOTTEN_NS = 1_000_000_000  # a worker that takes longer to reach _JUDGED_NS is not judged: it harms nobody
_MOST_WAITED = 0.2  # of that time, spent waiting
_MOST_STOLEN = 0.1  # of all CPUs' time, which the hypervisor gave to other guests
_LONGEST_REST_S = 32


class Permit:
    """Decides whether to look at all: not for a while if others want the CPUs, and for twice as long each time.

    Args:
        times: returns the CPU times of this process.
        clock: in nanoseconds.

    `rests` counts how often looking was given up.
    """

    def __init__(self, times: Callable[[], CpuTimes], clock: Callable[[], int] = perf_counter_ns) -> None:
        self.rests = 0
        self._times = times
        self._clock = clock
        self._rest_s = 1
        self._rests_until: int | None = None
        self._rested_ns = 0  # by all rests, up to the end of the present one
        self._judge_at = 0
        self._since: CpuTimes | None = None
        self._since_at = 0

    def rested_ns(self) -> int:
        """Return how long looking has been given up so far, whether or not anybody wanted to look."""
        return self._rested_ns - self.rest_left_ns()

    def rest_left_ns(self) -> int:
        """Return how long looking will still be given up; 0 if it is not."""
        return max(0, self._rests_until - self._clock()) if self._rests_until is not None else 0

    def allows(self, now: int) -> bool:
        """Return whether looking is allowed at `now`, a time of the clock that was given."""
        if self._rests_until is not None:
            if now < self._rests_until:
                return False
            self._rests_until, self._since = None, None
        if now >= self._judge_at:
            self._judge(now)
        return self._rests_until is None

    def _judge(self, now: int) -> None:
        self._judge_at = now + _JUDGED_NS // 4
        try:
            times, since = self._times(), self._since
        except (OSError, ValueError):  # the kernel does not tell now: go on without looking
            self._rest(now, _LONGEST_REST_S)
            return
        if since is None or now - self._since_at > _FORGOTTEN_NS:
            self._since, self._since_at = times, now
            return
        ran, waited = times.ran_ns - since.ran_ns, times.waited_ns - since.waited_ns
        if ran + waited < _JUDGED_NS:
            return
        self._since, self._since_at = times, now
        stolen = (times.stolen - since.stolen) / max(1, times.all - since.all)
        if waited > _MOST_WAITED * (ran + waited) or stolen > _MOST_STOLEN:
            self._rest(now, self._rest_s)
            self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
        else:
            self._rest_s = max(1, self._rest_s // 2)

    def _rest(self, now: int, seconds: int) -> None:
        self._rests_until = now + seconds * 1_000_000_000
        self._rested_ns += seconds * 1_000_000_000
        self.rests += 1


def find_permit() -> Permit | None:
    """Return a `Permit`, or None if the kernel does not tell what looking costs."""
    try:
        return Permit(Cpu().times)
    except OSError:
        return None


class Poller:
    """Decides whether to look, and does it.

    Args:
        duration_ns: the longest look; 0: it never looks.
        permit: decides whether it may look at all; None: it may not.
        clock: in nanoseconds.
    """

    def __init__(self, duration_ns: int, permit: Permit | None, clock: Callable[[], int] = perf_counter_ns) -> None:
        self._duration_ns = duration_ns
        self._permit = permit
        self._clock = clock
        self._in_vain = 0
        self._pause = 0
        self._rests_before, self._rested_ns_before = (permit.rests, permit.rested_ns()) if permit else (0, 0)

    @property
    def rests(self) -> int:
        """Return how often looking was given up for its cost since this poller was made."""
        return self._permit.rests - self._rests_before if self._permit else 0

    @property
    def rested_ns(self) -> int:
        """Return how long looking was given up for its cost since this poller was made."""
        return self._permit.rested_ns() - self._rested_ns_before if self._permit else 0

    @property
    def look_ns(self) -> int:
        """Return how long a look may take now: 0 while it is given up for its cost, and without a permit."""
        return 0 if self._permit is None or self._permit.rest_left_ns() else self._duration_ns

    def may_look(self) -> bool:
        """Return whether to look now; each call counts towards the end of a pause."""
        if self._pause:
            self._pause -= 1
            return False
        return self._permit is not None and self._duration_ns > 0 and self._permit.allows(self._clock())

    def finds_work(self, ring: BackRing, others: Sequence[BackRing]) -> bool:
        """Look for a request: True once `ring` has one; False when time is up, or once one of the `others` has one."""
        if not self.may_look():
            return False
        clock = self._clock
        end = clock() + self._duration_ns
        while clock() < end:
            for other in others:
                if other.has_moved():  # first: no ring has to wait until we are done looking here
                    return False
            if ring.has_moved():
                self._in_vain = 0
                return True
        self._in_vain += 1
        if self._in_vain >= _PATIENCE:
            self._in_vain = 0
            self._pause = _PAUSE
        return False
