"""Turns: a few at a time, in order, and each for a limited time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.supervisor.helpers import Clock, settle
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service.turns import Turn, Turns

TURN_S = 0.25


class Line:
    """Turns on a clock that stands still, and the numbers of those that have begun."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.bugs: list[Exception] = []
        self.loop = Reactor(self.clock, on_bug=self.bugs.append)
        self.crowds: list[int] = []
        self.turns = Turns(self.loop, 2, TURN_S, self.crowds.append)
        self.begun: list[int] = []

    def want(self, number: int) -> Turn:
        """Ask for a turn."""
        return self.turns.want(lambda: self.begun.append(number))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and do what is due."""
        self.clock.time += seconds
        settle(self.loop)


@pytest.fixture
def line() -> Iterator[Line]:
    """Return a line with room for two turns."""
    line = Line()
    yield line
    line.loop.close()
    assert [] == line.bugs


def test_as_many_begin_as_may(line: Line) -> None:
    """A turn begins at once if there is room; the others begin in order, as earlier ones end."""
    turns = [line.want(number) for number in range(5)]
    assert ([0, 1], False) == (line.begun, line.turns.is_free)
    line.turns.end(turns[1])
    settle(line.loop)
    assert [0, 1, 2] == line.begun
    line.turns.end(turns[0])
    line.turns.end(turns[2])
    settle(line.loop)
    assert [0, 1, 2, 3, 4] == line.begun
    line.turns.end(turns[3])
    assert line.turns.is_free
    assert [1, 0] == line.crowds


def test_a_crowd_is_told_of(line: Line) -> None:
    """The callback is told of a crowd when the first one has to wait, and of its end when no one waits any more,
    because the last one has begun or given up.
    """
    turns = [line.want(number) for number in range(2)]
    assert [] == line.crowds
    turns.append(line.want(2))
    line.turns.end(turns[2])
    assert [1, 0] == line.crowds
    line.want(3)
    line.turns.end(turns[0])
    assert [1, 0, 1] == line.crowds
    settle(line.loop)
    assert [1, 0, 1, 0] == line.crowds


def test_who_comes_late_overtakes_nobody(line: Line) -> None:
    """If a turn has ended and the next in the queue has not been called yet, a newcomer does not overtake it."""
    turns = [line.want(number) for number in range(3)]
    line.turns.end(turns[0])
    assert not line.turns.is_free
    line.want(9)
    assert [0, 1] == line.begun
    settle(line.loop)
    assert [0, 1, 2] == line.begun


def test_who_ends_before_its_turn_has_none(line: Line) -> None:
    """A turn that is ended before it has begun never begins; ending a turn twice is the same as ending it once."""
    turns = [line.want(number) for number in range(5)]
    line.turns.end(turns[2])
    for _ in range(2):
        line.turns.end(turns[0])
    settle(line.loop)
    assert [0, 1, 3] == line.begun


def test_who_takes_long_counts_no_longer(line: Line) -> None:
    """After its time a turn no longer counts, and the next one begins, however many hang. When it ends later, that lets
    no further one begin.
    """
    turns = [line.want(0)]
    line.pass_time(0.2)
    turns += [line.want(number) for number in range(1, 6)]
    line.pass_time(0.049)
    assert [0, 1] == line.begun
    line.pass_time(0.001)
    assert [0, 1, 2] == line.begun
    line.turns.end(turns[0])
    settle(line.loop)
    assert [0, 1, 2] == line.begun
    line.pass_time(0.2)
    line.pass_time(0.05)
    assert [0, 1, 2, 3, 4] == line.begun


def test_one_that_cannot_begin_takes_no_turn(line: Line) -> None:
    """If `begin` raises an exception at once, the caller gets it. If it raises one later, that is reported, and the
    next one has its turn.
    """

    def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        line.turns.want(fail)
    turns = [line.want(0), line.want(1), line.turns.want(fail)]
    line.want(3)
    line.turns.end(turns[0])
    settle(line.loop)

    assert [0, 1, 3] == line.begun
    assert [LookupError] == [type(line.bugs.pop())]
