"""How often workers have died one after the other, how long to wait before the next one, and when to give up.

Must not start anything, nor read a clock.

A worker that died after the guest had got an answer is followed at once. One that died in vain is followed later each
time, and after the last time not at all: a request that kills whoever touches it must not keep the host busy for ever.
"""

from __future__ import annotations

REST_S = (0.0, 0.1, 0.3, 1.0, 2.0, 5.0)  # before the next worker, by how many have died in vain


class Backoff:
    """The count.

    lost      how the last worker ended, or why it could not serve; empty once the next one serves
    stopped   why there is no next one; empty while there is
    rest_s    seconds before the next one
    """

    lost: str
    stopped: str
    rest_s: float
    _count: int
    _failures: int

    def __init__(self) -> None:
        self.forget()

    def died(self, sentence: str, *, in_vain: bool) -> None:
        """Take note that a worker died."""
        self._count = self._count + 1 if in_vain else 1
        self.lost = sentence
        if self._count > len(REST_S):
            self.stopped = f"{sentence}, {self._count} in a row; `xenbackend resume` starts another one"
        else:
            self.rest_s = REST_S[self._count - 1]

    def failed(self, sentence: str) -> None:
        """Take note that a worker could not serve the disk: that is tried again for ever."""
        self._failures = min(self._failures + 1, len(REST_S))
        self.lost, self.rest_s = sentence, REST_S[self._failures - 1]

    def served(self) -> None:
        """Take note that the next one serves. Whether it does so for long is still to be seen."""
        self.lost, self._failures = "", 0

    def forget(self) -> None:
        """Begin anew."""
        self.lost = self.stopped = ""
        self.rest_s = 0.0
        self._count = self._failures = 0
