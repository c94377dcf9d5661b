"""Steps written as generators: their results and errors, at once or later, and in order."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from typing import Any

import pytest

from xenbackend.errors import DriverError
from xenbackend.loop.steps import Line, Steps, run

Log = list[Any]


class Later:
    """A step that is done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[..., None]] = []

    def __call__(self, then: Callable[..., None]) -> None:
        """Keep the callback."""
        self.waiting.append(then)

    def end(self, *answer: Any) -> None:
        """End the step."""
        self.waiting.pop(0)(*answer)


def now(*answer: Any) -> Callable[[Callable[..., None]], None]:
    """Return a step that is done at once."""
    return lambda then: then(*answer)


def test_results() -> None:
    """A step returns None, its one result, or a tuple of its results."""
    log: Log = []

    def steps() -> Generator[Any, Any, str]:
        log.append((yield now(0)))
        log.append((yield now(0, "one")))
        log.append((yield now(0, 1, 2)))
        return "end"

    run(steps(), lambda *ended: log.append(ended))

    assert [None, "one", (1, 2), (0, "end")] == log


def test_a_step_that_ends_later() -> None:
    """The generator does not go on before its step has ended."""
    later, log = Later(), []

    def steps() -> Generator[Any, Any, None]:
        log.append((yield later))

    run(steps(), lambda *ended: log.append(ended))
    assert [] == log
    later.end(0, "x")
    assert ["x", (0, None)] == log


def test_a_step_that_fails() -> None:
    """An error status is raised where the step was yielded, and can be caught there."""
    log: Log = []

    def steps() -> Generator[Any, Any, None]:
        try:
            yield now(errno.ENOSPC)
        except OSError as error:
            log.append(error.errno)
        yield now(errno.EIO)
        log.append("never")

    run(steps(), lambda *ended: log.append(ended))

    assert [errno.ENOSPC, (errno.EIO, None)] == log


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.ENOSPC, "x"), errno.ENOSPC), (OSError("x"), errno.EIO), (DriverError("x"), errno.EIO)],
)
def test_errors_of_their_own(error: Exception, status: int) -> None:
    """An exception from the generator becomes a status: an OSError's errno, EIO for a damaged image."""
    log: Log = []

    def steps() -> Generator[Any, Any, None]:
        yield now(0)
        raise error

    run(steps(), lambda *ended: log.append(ended))

    assert [(status, None)] == log


def test_many_steps_at_once() -> None:
    """Steps that end at once do not deepen the stack."""
    log: Log = []

    def steps() -> Generator[Any, Any, int]:
        count = 0
        for _ in range(5000):
            count += yield now(0, 1)
        return count

    run(steps(), lambda *ended: log.append(ended))

    assert [(0, 5000)] == log


def test_one_after_the_other() -> None:
    """In a line each generator begins after the one before has ended, even if that failed."""
    line, later, log = Line(), Later(), []

    def steps(name: str) -> Generator[Any, Any, None]:
        log.append(f"{name} begins")
        yield later

    for name in "ab":
        line.add(steps(name), lambda status, _, name=name: log.append(f"{name} ends {status}"))
    assert ["a begins"] == log
    later.end(errno.EIO)
    assert ["a begins", f"a ends {errno.EIO}", "b begins"] == log
    later.end(0)
    assert "b ends 0" == log[-1]


def test_any_number_can_wait_in_line() -> None:
    """Any number may wait in a line and end at once when it is their turn, without deepening the stack."""
    line, later, log = Line(), Later(), []

    def wait() -> Steps[None]:
        yield later

    def note(number: int) -> Steps[None]:
        log.append(number)
        yield from ()

    line.add(wait())
    for number in range(10_000):
        line.add(note(number))
    before = log[:]
    later.end(0)

    assert [] == before
    assert list(range(10_000)) == log
