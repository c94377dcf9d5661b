"""Steps that wait for one another, written as a generator that yields each of them.

Must not know what a step does.

    def replace(disk, place, data):
        yield partial(disk.write_meta, place, data)
        yield disk.sync

A step is a function that is given what to call when it is done: with 0 or a positive errno, and perhaps with a result,
which the ``yield`` then gives. An errno is raised there as an OSError; a generator that does not catch it ends with it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

from xenbackend.errors import DriverError

T = TypeVar("T")
Step = Callable[[Callable[..., None]], None]
Steps = Generator[Step, Any, T]
Ended = Callable[[int, Any], None]  # gets 0 or a positive errno, and what the steps returned


def _ignore(_status: int, _result: object) -> None:
    """Nobody waits for the end of steps that say themselves how they ended."""


def run(steps: Steps[Any], then: Ended = _ignore) -> None:
    """Begin the steps, and call `then` when they have ended: by return, by OSError, or by DriverError, which is EIO."""
    _Run(steps, then).go(0, None)


class Line:
    """Runs steps one after the other: who comes meanwhile waits until those before have ended."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Steps[Any], Ended]] = deque()
        self._is_running = self._is_looking = False

    def add(self, steps: Steps[Any], then: Ended = _ignore) -> None:
        """Run the steps when it is their turn; `then` as in `run`."""
        self._waiting.append((steps, then))
        self._look()

    def _look(self) -> None:
        """Begin what waits, one after the other; what ends at once makes no deeper stack."""
        if self._is_looking:
            return
        self._is_looking = True
        try:
            while self._waiting and not self._is_running:
                self._is_running = True
                steps, then = self._waiting.popleft()
                run(steps, partial(self._ended, then))
        finally:
            self._is_looking = False

    def _ended(self, then: Ended, status: int, result: Any) -> None:
        then(status, result)
        self._is_running = False
        self._look()


class _Run:
    """One generator on its way; a step that is done at once makes no deeper stack."""

    def __init__(self, steps: Steps[Any], then: Ended) -> None:
        self._steps = steps
        self._then = then
        self._is_inside = False
        self._answers: list[tuple[int, Any]] = []  # of the step that was done at once, if it was

    def go(self, status: int, result: Any) -> None:
        while True:
            try:
                step = self._steps.throw(OSError(status, "a step")) if status else self._steps.send(result)
            except StopIteration as stop:
                self._then(0, stop.value)
                return
            except (OSError, DriverError) as error:
                self._then(_errno_of(error), None)
                return
            self._is_inside = True
            step(self._done)
            self._is_inside = False
            if not self._answers:
                return
            status, result = self._answers.pop()

    def _done(self, status: int, *results: Any) -> None:
        result = results[0] if len(results) == 1 else results or None
        if self._is_inside:
            self._answers.append((status, result))
        else:
            self.go(status, result)


def _errno_of(error: OSError | DriverError) -> int:
    return errno.EIO if isinstance(error, DriverError) else error.errno or errno.EIO
