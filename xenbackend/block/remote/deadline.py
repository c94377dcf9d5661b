"""A deadline for an exchange on a socket, for callers that may wait.

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
        """Return the descriptor to wait for."""


class Deadline:
    """So many seconds from now, for all calls together; a socket's time-out is for each call, so it may never end."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """The seconds that are left, at least 0."""
        return max(0.0, self._at - time.monotonic())

    def do(self, near: HasDescriptor, step: Callable[[], _T]) -> _T:
        """Return the result of `step`. If it raises BlockingIOError, wait until `near` is readable, and call it again.

        Raises: any other exception of `step`; TimeoutError.
        """
        waiting = select.poll()
        waiting.register(near.fileno(), select.POLLIN)
        while left_s := self.left_s:
            try:
                return step()
            except BlockingIOError:
                waiting.poll(left_s * 1000)
        raise TimeoutError
