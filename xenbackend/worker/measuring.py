"""Times the layers of a chain in service for an interval, which an order may end early.

Must not wait for a layer, nor keep an order waiting: timers are put between the layers, and taken away again, while
requests are in flight. Before and afterwards they cost nothing.
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
        """Measure for so many seconds, then call `then`, even if the chain was exchanged or closed meanwhile.

        A measurement that is under way ends first, with its times so far: this service begins no second one, and no
        client waits any more for one that an earlier service began. 0 seconds do nothing else. Raises: DriverError, if
        no chain is open to be measured.
        """
        self._end()
        if not seconds:
            then("[]")
            return
        chain = stages.opened()
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
