"""How the workers of one vbd came and went.

Must not start anything, nor read a clock.
"""

from __future__ import annotations

LONG_S = 60.0  # a worker that lived so long did not die in vain


class Lives:
    """The lives.

    since       when the one that runs was started, by the loop's clock
    ended       when the last one ended, 0 once its successor serves
    has_died    the last one ended unasked, and no other one was started yet
    """

    def __init__(self, progress: list[int]) -> None:
        self.since = self.ended = 0.0
        self.has_died = False
        self._progress = progress  # of the guest, when the last worker ended

    def start(self, now: float) -> None:
        """Take note that one is started."""
        self.since = now
        self.has_died = False

    def end(self, now: float, progress: list[int], *, was_asked: bool = False) -> bool:
        """Take note that one has ended, as it was asked or not.

        Returns whether the guest got an answer meanwhile, or it lived long.
        """
        has_progressed = now - self.since > LONG_S or progress != self._progress
        self._progress, self.ended = progress, self.ended or now
        self.has_died = not was_asked
        return has_progressed
