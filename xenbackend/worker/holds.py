"""Why nothing is taken from the rings, and what is to be called once nothing is in flight.

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
    """The reasons in force: while there is one, nothing is taken from the rings."""

    def __init__(self) -> None:
        self.reasons: set[Hold] = set()
        self._thens: dict[Hold, Call] = {}

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __contains__(self, why: Hold) -> bool:
        return why in self.reasons

    def add(self, why: Hold, then: Call | None = None) -> None:
        """Hold for a reason; `quiet` calls `then`, once."""
        self.reasons.add(why)
        if then is not None:
            self._thens[why] = then

    def remove(self, why: Hold) -> None:
        """Stop holding for a reason, and forget its `then`."""
        self.reasons.discard(why)
        self._thens.pop(why, None)

    def bar_retries(self) -> bool:
        """Return whether requests that were taken and have failed must not be tried again now."""
        return bool(self.reasons - {Hold.REPLAY})

    def awaits_quiet(self) -> bool:
        """Return whether anything is to be called once nothing is in flight."""
        return bool(self._thens)

    def quiet(self) -> None:
        """Call what waits for this: nothing is in flight."""
        thens, self._thens = self._thens, {}
        for then in thens.values():
            then()
