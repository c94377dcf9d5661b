"""The limit of a phase's duration."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.supervisor.helpers import FAKE_OPENER, NEVER_READY, Clock, settle
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.vbd.events import Limit as Wanted
from xenbackend.supervisor.vbd.limit import LOOK_S, Limit

WAITS = (sys.executable, "-I", "-S", "-c", "import socket, sys; socket.socket(fileno=int(sys.argv[2])).recv(1)")


class Limited:
    """A limit, a clock that is moved by hand, and how often the limit was over."""

    def __init__(self) -> None:
        self.clock, self.over = Clock(), 0
        self.loop = Reactor(self.clock)
        self.progress, self.is_busy = 0, False
        self.unheard: Callable[[], object] = int  # what follows once the worker is heard
        self.limit = Limit(self.loop, self._note, lambda: (self.progress, self.is_busy), self._hear)

    def _hear(self) -> None:
        self.unheard()

    def _note(self) -> None:
        self.over += 1

    def after(self, seconds: float) -> int:
        """Let some time pass, and return how often the limit was over so far."""
        self.clock.time += seconds
        settle(self.loop)
        return self.over


@pytest.fixture
def limited() -> Iterator[Limited]:
    """Return a limit."""
    limited = Limited()
    yield limited
    limited.loop.close()


def test_the_time_is_over_once(limited: Limited) -> None:
    """A limit is over once, at its time, and not at all if another setting has replaced it."""
    limited.limit.set(Wanted(10.0))
    assert [0, 1, 1] == [limited.after(9.0), limited.after(1.0), limited.after(99.0)]
    limited.limit.set(Wanted(10.0))
    limited.limit.set(Wanted(None))
    assert 1 == limited.after(99.0)


def test_a_guest_that_is_quiet_ends_it_before(limited: Limited) -> None:
    """A limit with `quiet_s` is over early once the guest is quiet. A request that is answered, taken or in flight
    postpones that, but never beyond the whole limit.
    """

    def turns(count: int) -> int:
        return [limited.after(LOOK_S) for _ in range(count)][-1]

    limited.limit.set(Wanted(10 * LOOK_S, 3 * LOOK_S))
    quiet = [turns(3), turns(2)]
    limited.limit.set(Wanted(10 * LOOK_S, 3 * LOOK_S))
    turns(2)
    limited.progress += 1
    progressed = [turns(3), turns(2)]
    limited.limit.set(Wanted(10 * LOOK_S, 3 * LOOK_S))
    limited.is_busy = True
    busy = [turns(9), turns(2)]

    assert ([0, 1], [1, 2], [2, 3]) == (quiet, progressed, busy)


@pytest.mark.parametrize(("seconds", "expected"), [(5.0, 1), (None, 0)])
def test_what_was_said_in_time_counts(limited: Limited, seconds: float | None, expected: int) -> None:
    """If the loop comes late, the worker is heard first. If what it has said sets another limit, or none, that one
    counts from now on.
    """
    limited.limit.set(Wanted(10.0))
    limited.unheard = lambda: limited.limit.set(Wanted(seconds))
    late = limited.after(60.0)
    limited.unheard = int

    assert (0, 0, expected) == (late, limited.after(4.0), limited.after(1.0))


@pytest.mark.slow
def test_no_time_passes_while_a_worker_waits_for_its_turn(limited: Limited) -> None:
    """A limit starts when the worker's process exists, so that each phase gets its full time."""
    fleet = Fleet(limited.loop, WAITS, NEVER_READY, FAKE_OPENER)
    fleet.prepare()
    worker = fleet.start(lambda *_: None, lambda _: None)
    limited.limit.set(Wanted(99.0), worker)
    limited.limit.set(Wanted(10.0), worker)
    waited = limited.after(50.0)
    limited.after(10.0)
    assert (0, True) == (waited, worker.is_there)
    seen = [limited.after(9.0), limited.after(1.0)]
    worker.kill("the test is over")
    select.select([worker.descriptors[1]], [], [], 20)
    limited.after(0.0)
    fleet.close()

    assert [0, 1] == seen
