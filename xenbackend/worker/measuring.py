"""Times the layers of a chain in service for an interval, which an order may end early.

Must not wait for a layer, nor keep an order waiting: timers are put between the layers, and taken away again, while
requests are in flight. Before and afterwards they cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from xenbackend.loop.reactor import Reactor
from xenbackend.loop.steps import Steps
from xenbackend.protocol.codes import Code
from xenbackend.worker.channel import Channel, fits
from xenbackend.worker.stages import Stages


class Measuring:
    """At most one measurement at a time, and the replies to the questions that asked for one."""

    def __init__(self, reactor: Reactor, channel: Channel) -> None:
        self._timer = reactor.timer(self.end)
        self._reactor = reactor
        self._channel = channel
        self._end: Callable[[], None] | None = None  # ends the one under way
        self._number = -1  # of the question that asked for it
        self._waiting: set[int] = set()  # of questions whose turn has not come

    def in_turn(self, number: int, steps: Steps[None]) -> Steps[None]:
        """Return the steps of a question, which do nothing if it is ended, and answered, before its turn."""
        self._waiting.add(number)

        def begin() -> Steps[None]:
            if number in self._waiting:
                self._waiting.discard(number)
                yield from steps

        return begin()

    def begin(self, stages: Stages, seconds: float, number: int) -> None:
        """Measure for so many seconds, then reply, even if the chain was exchanged or closed meanwhile.

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
            self._reply(number, json.dumps([each.as_json() for each in timers]))

        self._end, self._number = end, number
        self._timer.set(self._reactor.now() + seconds)

    def end(self) -> None:
        """End the measurement that is under way, with its times so far."""
        end, self._end = self._end, None
        self._timer.set(None)
        if end is not None:
            end()

    def end_all(self) -> None:
        """End it, and those that wait for their turn, such as behind an exchange that hangs."""
        waiting, self._waiting = self._waiting, set()
        self.end()
        for number in waiting:
            self._reply(number, "[]")

    def give_up(self) -> None:
        """Tell who waits for the measurement under way that there will be none, because the worker ends."""
        self._timer.set(None)
        if self._end is not None:
            self._end = None
            self._channel.reply(self._number, Code.GONE, "the disk's worker was ended before the measurement was done")

    def _reply(self, number: int, times: str) -> None:
        if fits(times):
            self._channel.reply(number, Code.OK, data=times)
        else:
            self._channel.reply(number, Code.FAILED, "the chain has too many layers to tell their times in one answer")
