"""Sequences of asynchronous steps, written as a generator that yields one step after the other.

Must not know what a step does.

    def replace(disk, place, data):
        yield partial(disk.write_meta, place, data)
        yield disk.sync

A step is a function that gets a callback, and calls it when the step is done: with 0 or a positive errno, and perhaps
with a result, which becomes the value of the ``yield``. An errno is raised there as an OSError; if the generator does
not catch it, the sequence ends with it.
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
Ended = Callable[[int, Any], None]  # gets 0 or a positive errno, and the value that the generator returned


def _ignore(_status: int, _result: object) -> None:
    """Do nothing: the default for steps that report their end themselves."""


def run(steps: Steps[Any], then: Ended = _ignore) -> None:
    """Begin the steps, and call `then` when they end: by return, by OSError, or by DriverError, which counts as EIO."""
    _Run(steps, then).go(0, None)


class Line:
    """A queue of sequences, which run one at a time: a new one waits until all earlier ones have ended."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Steps[Any], Ended]] = deque()
        self._is_running = self._is_looking = False

    def add(self, steps: Steps[Any], then: Ended = _ignore) -> None:
        """Run the steps when all earlier ones have ended; `then` is as in `run`."""
        self._waiting.append((steps, then))
        self._look()

    def _look(self) -> None:
        """Begin waiting sequences one after the other, in a loop: sequences that end at once must not nest calls."""
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
    """A running generator. Steps that are done at once are handled in a loop, so that they do not nest calls."""

    def __init__(self, steps: Steps[Any], then: Ended) -> None:
        self._steps = steps
        self._then = then
        self._is_inside = False
        self._answers: list[tuple[int, Any]] = []  # of a step that was done at once; else empty

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
