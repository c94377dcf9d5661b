"""How long the phase that a vbd is in may last.

Must not know phases. A worker's time is its own: none passes while it waits for its turn to be started, as many do at
once on a slow host. Nothing keeps it from having its turn (`service.births`).
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service.fleet import Worker


class Limit:
    """One vbd's; `on_over` is called by the loop when the time is over."""

    def __init__(self, loop: Reactor, on_over: Callable[[], object]) -> None:
        self._loop = loop
        self._timer = loop.timer(on_over)
        self._seconds: float | None = None

    def set(self, seconds: float | None, worker: Worker | None = None) -> None:
        """Have so much time from now on, or from when the worker's process is there; None: no limit."""
        self._seconds = seconds
        self._timer.set(None)
        if worker is None:
            self._begin()
        else:
            worker.when_there(self._begin)

    def _begin(self) -> None:
        self._timer.set(None if self._seconds is None else self._loop.now() + self._seconds)
