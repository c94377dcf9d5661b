"""The time limit of the phase that a vbd is in.

Must not know phases. The time of a phase begins when its worker's process is there, not while that waits for its turn
to be started, as many do at once on a slow host. It is sure to get its turn (`service.births`).

The loop may come late, and then calls timers before it reads what has arrived meanwhile: the service may have been
stopped, or have waited for xenstore, or have taken over many disks. So the worker is heard before its time is over, and
what it has said by then may lead to another limit.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service.fleet import Worker
from xenbackend.supervisor.vbd.events import Limit as Wanted

LOOK_S = 0.05  # between two looks at whether the guest is quiet; only if that ends the phase


class Limit:
    """The limit of one vbd; the loop calls `on_over` when the time is over."""

    def __init__(
        self,
        loop: Reactor,
        on_over: Callable[[], object],
        activity: Callable[[], tuple[object, bool]],
        hear: Callable[[], object],
    ) -> None:
        """`activity` returns a value that changes with each request of the guest, and whether one is in flight.

        `hear` handles what the worker has said, and its end, without waiting.
        """
        self._loop = loop
        self._timer = loop.timer(self._look)
        self._on_over = on_over
        self._activity = activity
        self._hear = hear
        self._wanted = Wanted(None)
        self._end = self._quiet_since = 0.0
        self._seen: object = None

    def set(self, wanted: Wanted, worker: Worker | None = None) -> None:
        """Set the limit from now on, or, with a worker, from when its process is there."""
        self._wanted = wanted
        self._timer.set(None)
        if worker is None:
            self._begin()
        else:
            worker.when_there(self._begin)

    def _begin(self) -> None:
        now = self._loop.now()
        self._end = now + (self._wanted.seconds or 0.0)
        self._quiet_since, self._seen = now, None
        self._timer.set(None if self._wanted.seconds is None else self._next(now))

    def _next(self, now: float) -> float:
        return self._end if self._wanted.quiet_s is None else min(self._end, now + LOOK_S)

    def _look(self) -> None:
        now = self._loop.now()
        if now < self._end and not self._is_quiet(now):
            self._timer.set(self._next(now))
            return
        wanted = self._wanted
        self._hear()
        if self._wanted is wanted:
            self._on_over()

    def _is_quiet(self, now: float) -> bool:
        seen, is_busy = self._activity()
        if is_busy or seen != self._seen:
            self._seen, self._quiet_since = seen, now
        return self._wanted.quiet_s is not None and now - self._quiet_since >= self._wanted.quiet_s
