"""Measures the layers of a chain in service for an interval, by order, until that time is over or it is told to end.

Must not be kept waiting by a layer, nor keep an order waiting: timers are put between the layers while requests are in
flight, and taken away again. Before and afterwards the chain is as if there were none.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from xenbackend.loop.reactor import Reactor
from xenbackend.worker.stages import Stages

Then = Callable[[str], None]  # takes the layers' times as JSON, `Timed.as_json`


class Measuring:
    """At most one measurement at a time."""

    def __init__(self, reactor: Reactor) -> None:
        self._timer = reactor.timer(self._end)
        self._reactor = reactor
        self._under_way: Callable[[], None] | None = None  # ends it

    def begin(self, stages: Stages, seconds: float, then: Then) -> None:
        """Measure, and call `then` after so many seconds, also where the chain was exchanged or closed meanwhile.

        One that is under way ends now, with the times until then: the service begins no second one, and what an earlier
        one has begun nobody waits for. 0 seconds do nothing but that. Raises: DriverError, where no chain is open.
        """
        chain = stages.opened()
        self._end()
        if not seconds:
            then("[]")
            return
        timers = chain.time()
        stages.rewired(chain)

        def end() -> None:
            chain.untime()
            stages.rewired(chain)
            then(json.dumps([each.as_json() for each in timers]))

        self._under_way = end
        self._timer.set(self._reactor.now() + seconds)

    def _end(self) -> None:
        end, self._under_way = self._under_way, None
        self._timer.set(None)
        if end is not None:
            end()
