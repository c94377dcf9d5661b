"""A small pool of threads for blocking calls; threads are started when they are needed.

Must not touch anything of the loop but the one function that hands a call over to it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

Call = Callable[[], object]
Work = tuple[Call, Call, Callable[[Exception], Call]]
LIMIT = 16  # threads: enough to keep a disk busy without asynchronous I/O


class Threads:
    """Runs calls beside the loop. Only the loop's thread may use this object.

    Args:
        hand_over: makes the loop call a function; may be called from any thread.
        limit: the largest number of threads; further calls wait while all are busy.
    """

    def __init__(self, hand_over: Callable[[Call], None], limit: int = LIMIT) -> None:
        self._hand_over = hand_over
        self._limit = limit
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._done: deque[Call] = deque()  # the `then` of each call that has ended
        self._busy = 0  # calls whose `then` has not been called yet

    def run(self, function: Call, then: Call, on_error: Callable[[Exception], Call]) -> None:
        """Call `function` in a thread, then hand `then` over to the loop.

        If it raises an exception, hand `on_error(exception)` over before that. Raises: RuntimeError if no thread can be
        started, and there is none yet.
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
        """Finish all pending calls, and end the threads. Calls that they hand over from now on may be lost."""
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
            except Exception as error:  # the loop decides how to handle it
                self._hand_over(on_error(error))
            self._done.append(then)
            del work, function, then, on_error  # an idle thread must not keep what they belong to, such as a chain
            self._hand_over(self._finish)

    def _finish(self) -> None:
        self._busy -= 1
        self._done.popleft()()
