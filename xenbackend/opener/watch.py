"""Reports which file an opener waits for when a call does not return: a thread beside the one that opens.

Must not open anything, nor decide what follows from a report.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from xenbackend.protocol.opening import WAITS_S


class Watch:
    """Watches one step after another; `say` gets what a step waits for, and an empty text when the step is over."""

    def __init__(self, say: Callable[[str], None], patience_s: float = WAITS_S) -> None:
        """Start the thread, which ends at `close`, or with the process."""
        self._say = say
        self._patience_s = patience_s
        self._turn = threading.Condition()
        self._about = ""  # the step that is being done
        self._steps = 0  # begun so far
        self._is_said = self._is_closed = False
        threading.Thread(target=self._look, daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        with self._turn:
            self._is_closed = True
            self._turn.notify()

    @contextmanager
    def over(self, about: str) -> Iterator[None]:
        """Watch the step in this context, which is about the file `about`."""
        with self._turn:
            self._about = about
            self._steps += 1
            self._turn.notify()
        try:
            yield
        finally:
            with self._turn:
                self._about = ""
                if self._is_said:
                    self._is_said = False
                    self._say("")

    def _look(self) -> None:
        with self._turn:
            while self._turn.wait_for(lambda: self._is_closed or (self._about and not self._is_said)):
                if self._is_closed:
                    return
                if not self._turn.wait_for(partial(self._is_past, self._steps), self._patience_s):
                    self._is_said = True
                    self._say(self._about)

    def _is_past(self, step: int) -> bool:
        return self._is_closed or not self._about or self._steps != step
