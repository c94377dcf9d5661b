"""Records how the workers of one vbd came and went.

Must not start anything, nor read a clock.
"""

from __future__ import annotations

LONG_S = 60.0  # a worker that lived so long did not die in vain
TRUSTED_S = 3600.0  # nor one that broke the protocol after so long
SHORT_S = 1.0  # a life below this is short, whatever the worker recorded of what the guest received
_SHORT_LIVES = 10  # in a row, before further ones count as hasty


class Lives:
    """The lives of one vbd's workers.

    since       when the running worker was started, by the loop's clock
    ended       when the first worker ended since one last served; 0 while none has
    has_died    whether the last worker ended unasked, and no other one was started yet
    """

    def __init__(self, progress: list[int]) -> None:
        self.since = self.ended = 0.0
        self.has_died = False
        self._short = 0  # short lives in a row
        self._progress = progress  # of the guest, when the last worker ended

    def start(self, now: float) -> None:
        """Note that a worker is started."""
        self.since = now
        self.has_died = False

    @property
    def is_hasty(self) -> bool:
        """True while workers die right after they were started."""
        return self._short > _SHORT_LIVES

    def end(self, now: float, progress: list[int], *, was_asked: bool = False, is_breach: bool = False) -> bool:
        """Note that a worker has ended, as it was asked or not, or because it broke the protocol.

        Returns whether the guest received an answer meanwhile, or the worker lived long. The worker itself records what
        the guest received, so one that broke the protocol is not believed.
        """
        life_s = now - self.since
        has_progressed = life_s > TRUSTED_S if is_breach else life_s > LONG_S or progress != self._progress
        self._short = self._short + 1 if life_s < SHORT_S and not was_asked else 0
        self._progress, self.ended = progress, self.ended or now
        self.has_died = not was_asked
        return has_progressed
