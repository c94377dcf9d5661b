"""Steps written as generators: what they return and raise, at once or later, and one after the other."""

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
        """Keep what to call."""
        self.waiting.append(then)

    def end(self, *answer: Any) -> None:
        """Be done."""
        self.waiting.pop(0)(*answer)


def now(*answer: Any) -> Callable[[Callable[..., None]], None]:
    """Return a step that is done at once."""
    return lambda then: then(*answer)


def test_results() -> None:
    """A step without a result gives None, with one gives it, and with several all of them."""
    log: Log = []

    def steps() -> Generator[Any, Any, str]:
        log.append((yield now(0)))
        log.append((yield now(0, "one")))
        log.append((yield now(0, 1, 2)))
        return "end"

    run(steps(), lambda *ended: log.append(ended))

    assert [None, "one", (1, 2), (0, "end")] == log


def test_a_step_that_ends_later() -> None:
    """Nothing happens until a step has ended."""
    later, log = Later(), []

    def steps() -> Generator[Any, Any, None]:
        log.append((yield later))

    run(steps(), lambda *ended: log.append(ended))
    assert [] == log
    later.end(0, "x")
    assert ["x", (0, None)] == log


def test_a_step_that_fails() -> None:
    """A status is raised where the step was asked for, and can be caught there."""
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
    """What the steps raise themselves is a status, too: that of an OSError, EIO for a damaged image."""
    log: Log = []

    def steps() -> Generator[Any, Any, None]:
        yield now(0)
        raise error

    run(steps(), lambda *ended: log.append(ended))

    assert [(status, None)] == log


def test_many_steps_at_once() -> None:
    """Steps that are done at once make no deeper stack."""
    log: Log = []

    def steps() -> Generator[Any, Any, int]:
        count = 0
        for _ in range(5000):
            count += yield now(0, 1)
        return count

    run(steps(), lambda *ended: log.append(ended))

    assert [(0, 5000)] == log


def test_one_after_the_other() -> None:
    """In a line nothing begins before what came earlier has ended, also when that fails."""
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
    """However many wait behind steps that take long and end at once when it is their turn: the stack stays flat."""
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
