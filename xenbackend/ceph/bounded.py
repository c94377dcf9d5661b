"""Calls that may never come back, as librados waits for a cluster for as long as it takes: given up after a time.

Must not be used for a guest's I/O, which is never given up.

What was given up goes on in a thread of its own, and holds what it was called with, until the process ends.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TypeVar

from xenbackend.errors import DriverError

_T = TypeVar("_T")


class NotBack(DriverError):
    """A call was given up, and goes on by itself."""


def within(seconds: float, what: str, call: Callable[[], _T]) -> _T:
    """Return what `call` does. Raises: whatever it raises; NotBack with ETIMEDOUT."""
    results: list[_T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as failure:  # raised again by who waits
            failures.append(failure)

    thread = threading.Thread(target=run, name="ceph", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise NotBack(f"the cluster has not answered for {seconds:.0f} s: {what}", errno=errno.ETIMEDOUT)
    return results[0]
