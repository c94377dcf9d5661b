"""Times the layers of a chain in service for an interval, which an order may end early.

Must not wait for a layer, nor keep an order waiting: timers are put between the layers, and taken away again, while
requests are in flight. Before and afterwards they cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from xenbackend.loop.reactor import Reactor
from xenbackend.worker.stages import Stages

Then = Callable[[str | None], None]  # takes the layers' times as JSON, `Timed.as_json`; None if the worker ends first


class Measuring:
    """At most one measurement at a time."""

    def __init__(self, reactor: Reactor) -> None:
        self._timer = reactor.timer(self.end)
        self._reactor = reactor
        self._under_way: Callable[[], None] | None = None  # ends it
        self._then: Then | None = None  # of the one under way

    def begin(self, stages: Stages, seconds: float, then: Then) -> None:
        """Measure for so many seconds, then call `then`, even if the chain was exchanged or closed meanwhile.

        A measurement that is under way ends first, with its times so far: this service begins no second one, and no
        client waits any more for one that an earlier service began. Raises: DriverError, if no chain is open to be
        measured.
        """
        self.end()
        chain = stages.opened()
        timers = chain.time()
        stages.rewired(chain)

        def end() -> None:
            chain.untime()
            stages.rewired(chain)
            then(json.dumps([each.as_json() for each in timers]))

        self._under_way, self._then = end, then
        self._timer.set(self._reactor.now() + seconds)

    def give_up(self) -> None:
        """Tell who waits for a measurement that there will be none, because the worker ends."""
        then, self._under_way, self._then = self._then, None, None
        self._timer.set(None)
        if then is not None:
            then(None)

    def end(self) -> None:
        """End the measurement that is under way, with its times so far."""
        end, self._under_way, self._then = self._under_way, None, None
        self._timer.set(None)
        if end is not None:
            end()
