"""A small pool of threads for calls that sleep, started as they are needed.

Must not touch anything of the loop but the one function that hands a call over to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Call = Callable[[], object]
Work = tuple[Call, Call, Callable[[Exception], Call]]
LIMIT = 16  # threads: enough to keep a disk busy where there is no asynchronous I/O


class Threads:
    """Runs calls beside the loop. All methods belong to the loop's thread.

    Args:
        hand_over: has the loop call a function; may be called from any thread.
        limit: threads at most; what comes while all are busy waits.
    """

    def __init__(self, hand_over: Callable[[Call], None], limit: int = LIMIT) -> None:
        self._hand_over = hand_over
        self._limit = limit
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._busy = 0  # calls given out whose `then` has not been called

    def run(self, function: Call, then: Call, on_error: Callable[[Exception], Call]) -> None:
        """Call `function` in a thread, then hand `then` over; an exception first, as `on_error(exception)`.

        Raises: RuntimeError, where the host has no room for a thread, and there is none yet.
        """
        if self._busy >= len(self._threads) < self._limit:
            thread = threading.Thread(target=self._serve, name=f"pool-{len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)
        self._busy += 1
        self._work.put((function, then, on_error))

    def close(self) -> None:
        """Finish what was asked for, and end the threads. What they hand over now may never be called."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            function, then, on_error = work
            try:
                function()
            except Exception as error:  # the loop decides what a bug leads to
                self._hand_over(on_error(error))
            self._hand_over(lambda then=then: self._finish(then))  # type: ignore[misc]  # bound now, used later

    def _finish(self, then: Call) -> None:
        self._busy -= 1
        then()
