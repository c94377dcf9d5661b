"""Why nothing is taken from the rings, and who waits until nothing is in flight.

Must not know a request.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

Call = Callable[[], object]


class Hold(Enum):
    """A reason to take nothing from the rings."""

    FLUSH = "a flush failed, which is not answered"
    REPLAY = "what a predecessor had taken comes first"
    PAUSE = "an administrator paused the disk"
    SWAP = "the chain is exchanged for another one"
    END = "the frontend or the service goes away"
    HAND_OVER = "a successor goes on with what is held"


class Holds:
    """The reasons that stand: nothing is taken while there is any."""

    def __init__(self) -> None:
        self.reasons: set[Hold] = set()
        self._thens: dict[Hold, Call] = {}

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __contains__(self, why: Hold) -> bool:
        return why in self.reasons

    def add(self, why: Hold, then: Call | None = None) -> None:
        """Hold for a reason; `then` is called once, by `quiet`."""
        self.reasons.add(why)
        if then is not None:
            self._thens[why] = then

    def remove(self, why: Hold) -> None:
        """Hold no more for this reason."""
        self.reasons.discard(why)
        self._thens.pop(why, None)

    def bar_retries(self) -> bool:
        """Return whether even what was taken and has failed must not be done again now."""
        return bool(self.reasons - {Hold.REPLAY})

    def awaits_quiet(self) -> bool:
        """Return whether anybody waits until nothing is in flight."""
        return bool(self._thens)

    def quiet(self) -> None:
        """Nothing is in flight: call who waits for that."""
        thens, self._thens = self._thens, {}
        for then in thens.values():
            then()
