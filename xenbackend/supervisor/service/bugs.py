"""Exceptions that none of our code should have let out: counted, and each logged once.

Must not end anything. A guest or a worker that has found a bug can make it happen a million times, so at most one line
is logged for each place in our code.
"""

from __future__ import annotations

import traceback

from xenbackend.log import get_logger

_MOST = 1000  # places


class Bugs:
    """The bugs of one process; `count` is how many there were."""

    def __init__(self) -> None:
        self.count = 0
        self._places: set[tuple[type[Exception], str, int | None]] = set()
        self._log = get_logger("service")

    def note(self, bug: Exception) -> None:
        """Count a bug; the first one of its kind and place is logged with its traceback."""
        self.count += 1
        frames = traceback.extract_tb(bug.__traceback__)
        place = (type(bug), frames[-1].filename, frames[-1].lineno) if frames else (type(bug), str(bug), None)
        if place not in self._places and len(self._places) < _MOST:
            self._places.add(place)
            self._log.error(
                "an internal error (a bug); everything else continues, and it is logged only once", exc_info=bug
            )
