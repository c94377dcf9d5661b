"""Polling: a worker looks for requests before it sleeps, as long as that pays."""

from __future__ import annotations

import errno
import mmap
from itertools import pairwise

import pytest

from xenbackend.blkif.abi import REQ_PROD, X86_64, ring_entries
from xenbackend.blkif.ring import BackRing
from xenbackend.kernel.cpu import CpuTimes
from xenbackend.worker import polling
from xenbackend.worker.polling import Permit, Poller, find_permit

_STEP_NS = 500_000  # a fiftieth of the interval between judgements


class Clock:
    """A clock that advances by one each time it is read."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        """Return the time."""
        self.now += 1
        return self.now


def make_ring() -> tuple[BackRing, memoryview]:
    """Return an empty ring and its index words."""
    pages = memoryview(mmap.mmap(-1, 4096))
    return BackRing(pages, X86_64, ring_entries(X86_64, 0), lambda: None), pages.cast("I")


def test_work_is_found_at_once() -> None:
    """If there is a request, a look ends at once."""
    ring, words = make_ring()
    words[REQ_PROD] = 1
    clock = Clock()

    assert Poller(100, Permit(Times(), clock), clock).finds_work(ring, []) is True
    assert clock.now <= 3


@pytest.mark.parametrize("error", [OSError(5, "an I/O error"), ValueError("nothing to read")])
def test_times_that_cannot_be_had_forbid_a_look(error: Exception) -> None:
    """If the kernel does not say what polling costs, there is none for a while, and nothing else fails."""
    ring, words = make_ring()
    words[REQ_PROD] = 1
    clock = Clock()

    def times() -> CpuTimes:
        raise error

    poller = Poller(100, Permit(times, clock), clock)

    assert poller.finds_work(ring, []) is False
    assert 1 == poller.rests
    assert 0 == poller.look_ns


def test_a_look_ends_with_its_time() -> None:
    """In an empty ring a look ends after its duration, having found nothing."""
    ring, _ = make_ring()
    clock = Clock()

    assert Poller(100, Permit(Times(), clock), clock).finds_work(ring, []) is False
    assert 100 <= clock.now <= 102


@pytest.mark.parametrize("own", [0, 1])
def test_another_ring_ends_the_look(own: int) -> None:
    """Work in another ring ends a look, even if there is work in this ring: the loop learns of it by the event."""
    ring, own_words = make_ring()
    own_words[REQ_PROD] = own
    other, words = make_ring()
    words[REQ_PROD] = 1
    clock = Clock()

    assert Poller(1000, Permit(Times(), clock), clock).finds_work(ring, [other]) is False
    assert clock.now <= 3


def test_no_look_where_it_is_not_wanted() -> None:
    """With a duration of zero, or without a permit, there is no look, and the clock is not read."""
    ring, words = make_ring()
    words[REQ_PROD] = 1
    clock = Clock()

    assert Poller(0, Permit(Times(), clock), clock).finds_work(ring, []) is False
    assert Poller(100, None, clock).finds_work(ring, []) is False
    assert clock.now == 0


def looking(permit: Permit, times: Times, seconds: float, waits: float, stolen: float = 0.0) -> list[tuple[int, int]]:
    """Look all the time, and return the intervals, in ms, in which that was allowed.

    Args:
        permit: is asked every 500 us.
        times: what it reads.
        seconds: how long to look.
        waits: the part of our looking time in which somebody else runs.
        stolen: the part of all CPUs' time that the hypervisor takes.
    """
    start, allowed = times.now, []
    while times.now < start + seconds * 1e9:
        is_allowed = permit.allows(times.now)
        if is_allowed:
            allowed.append(times.now)
            times.ran += _STEP_NS * (1 - waits)
            times.waited += _STEP_NS * waits
        times.stolen += _STEP_NS * stolen
        times.now += _STEP_NS
    runs: list[tuple[int, int]] = []
    for each in allowed:
        ms = (each - start) // 1_000_000
        if runs and ms <= runs[-1][1] + 1:
            runs[-1] = runs[-1][0], ms
        else:
            runs.append((ms, ms))
    return runs


class Times:
    """What a process got of the CPUs' time."""

    def __init__(self) -> None:
        self.now = 0
        self.ran = self.waited = self.stolen = 0.0

    def __call__(self) -> CpuTimes:
        """Return the times by now: of one CPU, in ticks as long as our nanoseconds."""
        return CpuTimes(int(self.ran), int(self.waited), int(self.stolen), self.now)


@pytest.mark.parametrize("waits", [0.0, 0.02, 0.15])
def test_what_waits_for_us_is_no_reason_to_stop(waits: float) -> None:
    """Processes at nice 19, which take little of our time, do not stop polling."""
    times = Times()

    assert [(0, 9999)] == looking(Permit(times), times, 10, waits)


@pytest.mark.parametrize(("waits", "stolen"), [(0.5, 0.0), (0.3, 0.0), (0.0, 0.2)])
def test_beside_equals_tries_are_short_and_rare(waits: float, stolen: float) -> None:
    """If others want the CPUs as much as we do, or the hypervisor gives them away, a try takes 130 ms, and the rests
    get longer.
    """
    times = Times()
    tries = looking(Permit(times), times, 120, waits, stolen)
    rests = [after[0] - before[1] for before, after in pairwise(tries)]

    assert all(end - start <= 131 for start, end in tries)
    assert [1, 2, 4, 8, 16, 32, 32] == [round(rest / 1000) for rest in rests]


def test_when_equals_have_gone_it_looks_again() -> None:
    """Once the others have gone, polling begins again within half a minute, and later rests begin with the shortest."""
    times = Times()
    permit = Permit(times)
    looking(permit, times, 120, 0.5)
    ((first, end),) = looking(permit, times, 60, 0.0)
    assert first <= 33_000
    assert end == 59_999
    tries = looking(permit, times, 10, 0.5)

    assert [1, 2, 4] == [round((after[0] - before[1]) / 1000) for before, after in pairwise(tries)]


def test_rests_are_told() -> None:
    """At any moment it is known how often polling has rested, and for how long, even while nobody asks for a look."""
    times = Times()
    permit = Permit(times, lambda: times.now)
    before = Poller(1000, permit)
    told = [(permit.rests, permit.rested_ns(), before.look_ns)]
    looking(permit, times, 0.5, 0.5)
    told.append((permit.rests, round(permit.rested_ns() / 1e9, 1), before.look_ns))
    later = Poller(1000, permit)
    times.now += 60 * 10**9
    told.append((permit.rests, permit.rested_ns() / 1e9, before.look_ns))

    assert [(0, 0, 1000), (1, 0.4, 0), (1, 1.0, 1000)] == told
    assert (1, 1.0) == (before.rests, before.rested_ns / 1e9)
    assert (0, 0.6) == (later.rests, round(later.rested_ns / 1e9, 1))  # since this poller was made
    assert (0, 0, 0) == (Poller(1000, None).rests, Poller(1000, None).rested_ns, Poller(1000, None).look_ns)


def test_an_idle_worker_is_not_judged() -> None:
    """A worker that is mostly idle is not judged: a late wake-up is no sign of competition."""
    times = Times()
    permit = Permit(times)
    for _ in range(100_000):
        assert permit.allows(times.now)
        times.ran += 4_000
        times.waited += 4_000
        times.now += 10_000_000


def test_what_was_judged_once_is_not_judged_again() -> None:
    """Each interval is judged by itself: a tenth of a second of competition is not made up for by an earlier one
    without.
    """
    times = Times()
    permit = Permit(times)

    assert [(0, 99)] == looking(permit, times, 0.1, 0.1)
    assert permit.allows(times.now)
    assert [(0, 99)] == looking(permit, times, 0.1, 0.3)
    assert not permit.allows(times.now)


def test_times_are_read_now_and_then() -> None:
    """The times are read forty times a second, however often a look is asked for."""
    times = Times()
    reads: list[int] = []

    def read() -> CpuTimes:
        reads.append(times.now)
        return times()

    looking(Permit(read), times, 1, 0.0)

    assert [25] * 39 == [(later - before) // 1_000_000 for before, later in pairwise(reads)]


def test_nobody_looks_where_the_kernel_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel does not count what polling costs, there is no permit."""
    assert find_permit() is not None

    def refuse() -> None:
        raise OSError(errno.ENOENT, "/proc/self/schedstat")

    monkeypatch.setattr(polling, "Cpu", refuse)

    assert find_permit() is None


def test_looks_in_vain_are_given_up_for_a_while() -> None:
    """After eight looks in vain the next 256 are left out, and then one is tried."""
    ring, _ = make_ring()
    clock = Clock()
    poller = Poller(10, Permit(Times(), clock), clock)
    for _ in range(8):
        poller.finds_work(ring, [])
    spent = clock.now
    for _ in range(256):
        poller.finds_work(ring, [])
    assert clock.now == spent
    poller.finds_work(ring, [])

    assert clock.now > spent


def test_success_forgives_what_was_in_vain() -> None:
    """Only looks in vain in a row count: one that finds work resets the number."""
    ring, words = make_ring()
    clock = Clock()
    poller = Poller(10, Permit(Times(), clock), clock)
    for _ in range(20):
        words[REQ_PROD] = 0
        for _ in range(7):
            poller.finds_work(ring, [])
        words[REQ_PROD] = 1

        assert poller.finds_work(ring, []) is True
