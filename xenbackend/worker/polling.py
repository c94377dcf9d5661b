"""Looking for the next request for a moment before going to sleep.

Must not burn a CPU that finds nothing, nor one that somebody else wants as much as we do: it gives up for a while when
it was in vain, and when looking costs more than it should.

Why: to sleep and be woken costs 25 to 30 us on both sides, as much as serving ten requests. A guest that waits for one
answer before it sends the next request is back within that time.

What looking costs others shows in what it costs us: an equal that wants the same CPU gets half of it, and we wait for
as long as we ran. Something that runs at nice 19 when nobody else wants to makes us wait for next to nothing; it counts
as a runnable thread and as pressure on the CPU all the same, so that neither of these can tell them apart. Beside an
equal a try takes some 100 ms, and the tries become rare: one in half a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns

from xenbackend.blkif.ring import BackRing
from xenbackend.kernel.cpu import Cpu, CpuTimes

_PATIENCE = 8  # looks in vain, one after the other, before it gives up for a while
_PAUSE = 256  # sleeps without a look after that
_JUDGED_NS = 100_000_000  # of our time, running or waiting: one slice of something at nice 19 is 4 ms, and no reason
_FORGOTTEN_NS = 1_000_000_000  # who wants less than that in a second is not judged: it harms nobody
_MOST_WAITED = 0.2  # of that time
_MOST_STOLEN = 0.1  # of all CPUs' time by the hypervisor, which other guests want
_LONGEST_REST_S = 32


class Permit:
    """Whether to look at all: no, for a while, where the CPUs are wanted; each time in vain for twice as long.

    Args:
        times: what this process got of the CPUs.
        clock: in nanoseconds.

    `rests` is how often looking was given up.
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
        """Return for how long looking has been given up so far, whether or not anybody wanted to look."""
        return self._rested_ns - self.rest_left_ns()

    def rest_left_ns(self) -> int:
        """Return for how long it will still be."""
        return max(0, self._rests_until - self._clock()) if self._rests_until is not None else 0

    def allows(self, now: int) -> bool:
        """Return whether one may look now, by the clock that was given."""
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
        except (OSError, ValueError):  # the kernel does not tell now; requests go on without looking
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
    """Return what says whether to look for requests, None where the kernel does not tell what that costs."""
    try:
        return Permit(Cpu().times)
    except OSError:
        return None


class Poller:
    """Decides whether to look, and does it.

    Args:
        duration_ns: for how long it looks at most; 0 is never.
        permit: whether it may look at all; None where nobody can tell, and then it may not.
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
        """Return how often looking was given up, for what it cost, since there is this poller."""
        return self._permit.rests - self._rests_before if self._permit else 0

    @property
    def rested_ns(self) -> int:
        """Return for how long it was."""
        return self._permit.rested_ns() - self._rested_ns_before if self._permit else 0

    @property
    def look_ns(self) -> int:
        """Return how long a look may take now: 0 during such a rest, and where nobody may look."""
        return 0 if self._permit is None or self._permit.rest_left_ns() else self._duration_ns

    def may_look(self) -> bool:
        """True unless a look would be one too many now; each question counts towards the end of a pause."""
        if self._pause:
            self._pause -= 1
            return False
        return self._permit is not None and self._duration_ns > 0 and self._permit.allows(self._clock())

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
