"""Measures the layers of a chain in service for an interval, by order, and stops by itself.

Must not be kept waiting by a layer, nor keep an order waiting: timers are put between the layers while requests are in
flight, and taken away again. Before and afterwards the chain is as if there were none.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from xenbackend.block.chain import Chain
from xenbackend.errors import ConfigError
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.stages import Stages

Then = Callable[[str], None]  # takes the layers' times as JSON, `Timed.as_json`


class Measuring:
    """At most one measurement at a time."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._chain: Chain | None = None

    def begin(self, stages: Stages, seconds: float, then: Then) -> None:
        """Measure, and call `then` after so many seconds, also where the chain was exchanged or closed meanwhile.

        Raises: DriverError, where no chain is open; ConfigError, where one is measured already.
        """
        if self._chain is not None:
            raise ConfigError("its layers are measured already; ask again when that is over")
        chain = self._chain = stages.opened()
        timers = chain.time()
        stages.rewired(chain)

        def end() -> None:
            self._chain = None
            chain.untime()
            stages.rewired(chain)
            then(json.dumps([each.as_json() for each in timers]))

        self._reactor.call_later(seconds, end)
