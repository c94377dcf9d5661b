"""A time by which something on a socket has to be done, however many bytes that takes: for whoever may wait.

Must not be used while requests are served.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

_T = TypeVar("_T")


class HasDescriptor(Protocol):
    """Something that can be waited for."""

    def fileno(self) -> int:
        """Return its descriptor."""


class Deadline:
    """So many seconds from now on; as a time-out of a socket is one of each call, a byte now and then outlives that."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """How long it still is, 0 at least."""
        return max(0.0, self._at - time.monotonic())

    def do(self, near: HasDescriptor, step: Callable[[], _T]) -> _T:
        """Return what `step` does, which is called anew whenever there is more to receive where it would block.

        Raises: what `step` does; TimeoutError.
        """
        waiting = select.poll()
        waiting.register(near.fileno(), select.POLLIN)
        while left_s := self.left_s:
            try:
                return step()
            except BlockingIOError:
                waiting.poll(left_s * 1000)
        raise TimeoutError
