"""Waiting for what another process does, without taking its CPU."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 30.0  # a failed test takes this long, a passed one does not
_PAUSE_S = 0.002
T = TypeVar("T")


def until(condition: Callable[[], T], what: object = "it never happened", *, limit_s: float = PATIENCE_S) -> T:
    """Return what a condition returns as soon as that is true; `what`, or what it returns, says what never was.

    Raises: AssertionError, after the limit.
    """
    give_up = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < give_up, what() if callable(what) else what
        select.select([], [], [], _PAUSE_S)
    return found
