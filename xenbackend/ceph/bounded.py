"""Time limits for calls that may never return, since librados waits for a cluster without limit.

Must not be used for a guest's I/O, which is never given up.

A call that was given up continues in its thread, with its arguments, perhaps until the process ends. So it may return
when nobody waits for it any more, perhaps after a later call of the same kind. Everything that others can see it must
therefore do within `Attempt.step`, and what it has made is undone when it returns too late.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from xenbackend.errors import DriverError

_T = TypeVar("_T")


class NotBack(DriverError):
    """A call was given up, and continues in its thread."""


class Attempt:
    """One call. Whether it returned in time or was given up is decided once, both for the call and for its caller."""

    def __init__(self, seconds: float | None, what: str) -> None:
        """Give the call up after `seconds`, never if None; `what` is part of the error message about that."""
        self._seconds = seconds
        self._what = what
        self._lock = threading.Lock()
        self._is_given_up = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within the call, enclose a short step that others can see. The call is not given up while the step runs.

        Raises: NotBack if the call was given up before.
        """
        with self._lock:
            if self._is_given_up:
                raise self._not_back()
            yield

    def run(self, call: Callable[[], _T], undo: Callable[[], None] = lambda: None) -> _T:
        """Return the result of `call`. If the call is given up, `undo` is called when it ends, in whatever way.

        Raises: what `call` raises; NotBack with ETIMEDOUT.
        """
        results: list[_T] = []
        failures: list[BaseException] = []
        ended = threading.Event()

        def run() -> None:
            found: list[_T] = []
            failed: list[BaseException] = []
            try:
                found.append(call())
            except BaseException as failure:  # raised again in the caller's thread
                failed.append(failure)
            with self._lock:
                is_late = self._is_given_up
                results.extend(found)
                failures.extend(failed)
                ended.set()
            if is_late:
                undo()

        threading.Thread(target=run, name="ceph", daemon=True).start()
        ended.wait(self._seconds)
        with self._lock:
            self._is_given_up = not ended.is_set()
        if self._is_given_up:
            raise self._not_back()
        if failures:
            raise failures[0]
        return results[0]

    def _not_back(self) -> NotBack:
        return NotBack(f"the cluster has not answered for {self._seconds:.0f} s: {self._what}", errno=errno.ETIMEDOUT)


def within(seconds: float, what: str, call: Callable[[], _T]) -> _T:
    """Return the result of `call`, which leaves nothing to undo. Raises: as `Attempt.run`."""
    return Attempt(seconds, what).run(call)
