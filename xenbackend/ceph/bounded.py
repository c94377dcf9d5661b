"""Calls that may never come back, as librados waits for a cluster for as long as it takes: given up after a time.

Must not be used for a guest's I/O, which is never given up.

What was given up goes on in a thread of its own, and holds what it was called with, until the process ends. So it may
come back when nobody waits any more, perhaps after another one like it: what others see it does within `Attempt.step`,
and what it has made by then is undone.
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
    """A call was given up, and goes on by itself."""


class Attempt:
    """One call. Whether it came back in time or was given up is decided once, for it and for who waits alike."""

    def __init__(self, seconds: float | None, what: str) -> None:
        """It is given up after so many seconds, None: never; `what` is a part of the sentence about that."""
        self._seconds = seconds
        self._what = what
        self._lock = threading.Lock()
        self._is_given_up = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do what others see, and what is quick, unless the call was given up; until it is done, it is not given up.

        Raises: NotBack, where nobody waits for it any more.
        """
        with self._lock:
            if self._is_given_up:
                raise self._not_back()
            yield

    def run(self, call: Callable[[], _T], undo: Callable[[], None] = lambda: None) -> _T:
        """Return what `call` does. If it is given up, `undo` is called once it has ended, however that may be.

        Raises: whatever it raises; NotBack with ETIMEDOUT.
        """
        results: list[_T] = []
        failures: list[BaseException] = []
        ended = threading.Event()

        def run() -> None:
            found: list[_T] = []
            failed: list[BaseException] = []
            try:
                found.append(call())
            except BaseException as failure:  # raised again by who waits
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
    """Return what `call` does, of which nothing has to be undone. Raises: as `Attempt.run`."""
    return Attempt(seconds, what).run(call)
