"""The closed loop, over a generator that answers at once."""

from __future__ import annotations

from xenbackend.bench.loop import ClosedLoop
from xenbackend.bench.plan import WORKS, Work

DEPTH_32 = WORKS[1]


class Echo(ClosedLoop):
    """A generator whose requests have all been answered by the next look."""

    name = "echo"

    def start(self, work: Work, places: list[int]) -> None:
        """Fill the queue."""
        self.in_flight = list(range(work.depth))
        self.issued = work.depth
        self.reaped = 0

    def reap(self) -> list[int]:
        """Finish up to eight."""
        finished = self.in_flight[:8]
        self.in_flight = self.in_flight[8:]
        self.reaped += len(finished)
        return finished

    def renew(self, finished: list[int]) -> int:
        """Issue them again."""
        self.in_flight += finished
        self.issued += len(finished)
        return finished[-1]

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def test_as_many_go_as_come() -> None:
    """A closed loop keeps its depth: the number in flight stays the same, and each request is counted."""
    loop = Echo()
    loop.start(DEPTH_32, [])
    requests = loop.run(0.001).requests + loop.run(0.001).requests

    assert requests == loop.reaped == loop.issued - DEPTH_32.depth
    assert DEPTH_32.depth == len(loop.in_flight)


def test_one_request_is_timed_at_a_time() -> None:
    """A sample is the time from a request's issue to its answer: at depth 32 with batches of 8, one in four batches."""
    loop = Echo()
    loop.start(DEPTH_32, [])
    window = loop.run(0.005)

    assert abs(window.requests // 32 - len(window.latencies)) <= 1
    assert min(window.latencies) > 0
    assert sum(window.latencies) <= window.seconds * 1e9  # one after the other, they fit into the window


def test_drain_reaps_what_is_in_flight_and_issues_nothing() -> None:
    """After draining nothing is in flight, so that the next workload starts clean."""
    loop = Echo()
    loop.start(DEPTH_32, [])
    loop.drain(DEPTH_32)

    assert ([], DEPTH_32.depth) == (loop.in_flight, loop.issued)


def test_a_generator_looks_before_it_sleeps() -> None:
    """Waiting polls first and sleeps only when its polling time is over."""
    loop = Echo()
    loop.poll_ns = 10**9
    looks = iter([0, 0, 3])

    assert loop.wait(lambda: next(looks), lambda: -1) == 3

    loop.poll_ns = 0

    assert loop.wait(lambda: 0, lambda: 5) == 5


def test_waiting_is_not_work() -> None:
    """A generator that never waits is wholly busy."""
    loop = Echo()
    loop.start(DEPTH_32, [])

    assert loop.run(0.002).busy == 1


class Idle(Echo):
    """Waits half a millisecond for each batch."""

    def reap(self) -> list[int]:
        """Wait, then finish up to eight."""
        self.poll_ns = 500_000
        self.wait(lambda: 0, lambda: 1)
        return super().reap()


def test_waiting_is_taken_off() -> None:
    """Time spent waiting does not count as the generator's work."""
    loop = Idle()
    loop.start(DEPTH_32, [])

    assert loop.run(0.05).busy < 0.5
