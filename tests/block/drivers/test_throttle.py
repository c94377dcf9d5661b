"""The driver throttle."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest

from tests.helpers_block import Bottom, Machine, StepEnv, again, discard, flush, read, write
from xenbackend.block.checked import Checked
from xenbackend.block.driver import Geometry
from xenbackend.block.drivers.throttle import Throttle
from xenbackend.block.request import Op, Request
from xenbackend.block.spec import parse_chain
from xenbackend.errors import ChainError, DriverError

GEOMETRY = Geometry(1 << 40, can_discard=True, discard_granularity=4096)


@dataclass
class Clock(StepEnv):
    """An `Env` whose timers go off when they are due, each delayed by what `late` returns."""

    time: float = 1000.0
    late: Callable[[], float] = lambda: 0.0
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)

    def now(self) -> float:
        """See `Env`."""
        return self.time

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """See `Env`."""
        heapq.heappush(self._due, (self.time + delay_s + self.late(), next(self._order), function))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._due and self._due[0][0] <= until:
            self.time, _, function = heapq.heappop(self._due)
            function()
        self.time = until


class Instant(Bottom):
    """A source that does everything at once and records the time."""

    def __init__(self, env: Clock) -> None:
        super().__init__()
        self.env = env
        self.done: list[tuple[float, Request]] = []

    def submit(self, batch: list[Request]) -> None:
        """Do it."""
        self.done += [(self.env.time, request) for request in batch]
        for request in batch:
            request.status = 0
        self.complete(batch)


@dataclass
class Load:
    """A throttle over a source, with the requests that have come back."""

    options: str
    env: Clock = field(default_factory=Clock)
    back: deque[Request] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.driver = Throttle(parse_chain(f"throttle:{self.options}|null:1G").layers[0].options)
        self.bottom = Instant(self.env)
        self.checked = Checked("the guest", "throttle", GEOMETRY)
        self.driver.env, self.driver.next, self.driver.below = self.env, self.bottom, GEOMETRY
        self.driver.open(self.env)
        self.checked.next = self.driver
        self.bottom.complete = self.driver.complete = self.checked.on_complete
        self.checked.complete = self.back.extend

    def keep_up(self, requests: list[Request], seconds: float) -> list[Request]:
        """Keep these requests in flight for so long, sending each again once it is back. Return those done."""
        before, end = len(self.bottom.done), self.env.time + seconds
        self.back.extend(requests)
        while self.env.time < end:
            if self.back:
                batch = [again(self.back.popleft()) for _ in range(len(self.back))]
                self.checked.submit(batch)
            if not self.back:
                due = self.env._due
                self.env.run(min(end, due[0][0]) if due else end)
        return [request for _, request in self.bottom.done[before:]]


@pytest.mark.parametrize("depth", [1, 64])
@pytest.mark.parametrize(
    ("options", "length", "rate"),
    [
        ("iops=10", 4096, 10),
        ("iops=500", 4096, 500),
        ("iops=20000", 4096, 20000),
        ("bps=1M", 4096, 256),
        ("bps=200M", 65536, 3200),
        ("bps=100K", 1 << 20, 100 / 1024),
        ("iops=100,size=64K", 1 << 20, 100 / 16),
        ("iops=100,bps=1M", 4096, 100),
        ("iops=1000,bps=1M", 4096, 256),
        ("iops=1000,iops_read=100", 4096, 100),
    ],
)
def test_the_rate_is_what_was_asked_for(options: str, length: int, rate: float, depth: int) -> None:
    """C2: the rate is right within 2 %, even if a busy neighbour delays each timer by up to 30 ms."""
    chance = Random(1)
    load = Load(options, Clock(late=lambda: chance.random() * 0.03))
    load.keep_up([read(place * length, length) for place in range(depth)], 1)
    seconds = 2000 if rate < 1 else 20 if rate < 1000 else 1
    done = load.keep_up([], seconds)

    assert abs(len(done) - rate * seconds) <= max(2, 0.02 * rate * seconds), len(done)


@pytest.mark.parametrize(("options", "most"), [("iops=500", 50), ("iops=50,iops_burst=500,burst=2s", 50)])
def test_nothing_above_the_burst_in_any_100_ms(options: str, most: int) -> None:
    """C2: no 100 ms have more requests than the bucket holds and what leaks from it meanwhile, even after a rest."""
    load = Load(options)
    for rest in (0.0, 30.0, 0.05):
        load.env.run(load.env.time + rest)
        load.keep_up([read(0, 4096) for _ in range(64)], 3)
        load.env.run(load.env.time + 60)
        load.back.clear()
    times = [at for at, _ in load.bottom.done]
    within = max(bisect_left(times, at + 0.1) - place for place, at in enumerate(times))

    assert most < within <= 2 * most + 2


def test_a_burst_lasts_as_long_as_was_said() -> None:
    """An idle disk runs at the burst's rate for `burst` seconds and a little longer, then at its own."""
    load = Load("iops=20,iops_burst=200,burst=10s")
    counts = [len(load.keep_up([read(0, 512) for _ in range(32)] * (second == 0), 1)) for second in range(20)]

    assert all(abs(each - 200) <= 25 for each in counts[:11]), counts
    assert all(abs(each - 20) <= 3 for each in counts[13:]), counts


def test_one_direction_holds_up_the_other_never() -> None:
    """C3: reads that wait at their limit do not delay writes."""
    load = Load("iops_read=10,iops=10000")
    batch = [read(0, 512) for _ in range(32)] + [write(0, bytes(512)) for _ in range(32)]
    load.keep_up(batch, 1)
    reads = sum(request.op == Op.READ for _, request in load.bottom.done)

    assert reads <= 12
    assert len(load.bottom.done) - reads > 9000


def test_both_directions_have_their_turn() -> None:
    """If reads and writes wait for the same limit, neither starves."""
    load = Load("iops=100")
    done = load.keep_up([read(0, 512) for _ in range(60)] + [write(0, bytes(512)) for _ in range(4)], 20)
    writes = sum(request.op == Op.WRITE for request in done)

    assert writes > 100, writes


def test_each_request_passes_once_and_in_order() -> None:
    """C3: twenty thousand requests below two limits each go down once, in order within each direction."""
    load, chance = Load("iops=20000,bps=80M,bps_read=70M,size=8K"), Random(2)
    sent: tuple[list[Request], list[Request]] = ([], [])
    for _ in range(800):
        batch = []
        for _ in range(25):
            is_write = chance.randrange(2)
            make = write(0, bytes(4096)) if is_write else read(0, chance.choice([512, 4096, 8192]))
            batch.append(make)
            sent[is_write].append(make)
        load.checked.submit(list(batch))
        load.env.run(load.env.time + chance.random() * 0.002)
    load.env.run(load.env.time + 100)
    done = [request for _, request in load.bottom.done]

    assert len(done) == 20_000
    assert all(sent[way] == [each for each in done if each.op == way] for way in (0, 1))


def test_a_flush_waits_for_nothing_and_a_discard_is_a_write() -> None:
    """A flush never waits. A discard counts as one write, however much it covers."""
    load = Load("iops_write=1,bps=1M")
    first, second, third, last = discard(0, 1 << 30), discard(0, 1 << 30), flush(), read(0, 4096)
    load.checked.submit([first, second, third, last])
    assert {first, third, last} == {request for _, request in load.bottom.done}
    load.env.run(load.env.time + 1)

    assert second is load.bottom.done[-1][1]


def test_what_is_held_back_is_let_go_and_charged() -> None:
    """C1: when requests have to drain, `release` passes on all that are held back and charges them, so the limit holds
    before and after.
    """
    load = Load("iops=10")
    load.checked.submit([read(0, 512) for _ in range(200)])
    at_first = len(load.bottom.done)
    load.driver.release()
    after = len(load.back)
    load.checked.submit([read(0, 512)])
    load.env.run(load.env.time + 18)
    held = len(load.back)
    load.env.run(load.env.time + 2)

    assert (2, 200, 200, 201) == (at_first, after, held, len(load.back))
    assert {"waiting": 0, "held": 199} == {key: load.driver.figures()[key] for key in ("waiting", "held")}


def test_a_timer_belongs_to_one_opening() -> None:
    """C1: a timer of a throttle that has been closed does nothing."""
    load = Load("iops=1")
    load.checked.submit([read(0, 512) for _ in range(3)])
    load.driver.release()
    load.driver.close()
    load.env.run(load.env.time + 60)

    assert len(load.back) == 3


def test_what_was_used_up_outlives_a_worker() -> None:
    """D11: a guest gets no new burst when its worker dies."""
    former = Load("iops=10,iops_burst=100,burst=5s")
    assert len(former.keep_up([read(0, 512) for _ in range(600)], 0.01)) == len(former.bottom.done)
    used = len(former.bottom.done)
    env = Clock(time=former.env.time, memories=former.env.memories)
    load = Load("iops=10,iops_burst=100,burst=5s", env)
    load.checked.submit([read(0, 512) for _ in range(600)])

    assert used >= 10
    assert len(load.bottom.done) <= 1


def test_what_waits_is_shown() -> None:
    """C2: figures show how many requests wait, and how many have waited and for how long."""
    load = Load("iops=10")
    load.checked.submit([read(0, 512) for _ in range(4)])
    assert {"waiting": 2, "held": 2, "held_ms": 0} == load.driver.figures()
    load.env.run(load.env.time + 1)

    assert {"waiting": 0, "held": 2, "held_ms": 300} == load.driver.figures()
    assert "10 requests a second" == load.env.facts["limits"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("iops_burst=10", "iops_burst has no effect without iops"),
        ("iops=10,iops_burst=10", "iops_burst is 10; it must be more than iops=10"),
        ("bps=1M,burst=5s", "burst has no effect without the rate of a burst"),
        ("bps=1M,bps_burst=2M,burst=10ms", "burst must be between 1s and"),
        ("bps=1M,size=4K", "size has no effect without iops"),
        ("group=a", "group has no effect without a limit"),
        ("iops=10,group=a b", "'a b' is not a name for a group"),
        ("iops=10,iops_read=10", "iops_read is 10; it has no effect unless it is below iops"),
        ("bps=1M,bps_write=2M", "bps_write is 2097152; it has no effect"),
        ("bps_read=9P", "no limit may be more than"),
        ("iops=-1", "is not a whole number of 0 or more"),
    ],
)
def test_settings_without_effect_are_refused(options: str, problem: str) -> None:
    """C3: settings that would be accepted without any effect are refused before anything is opened."""
    with pytest.raises(ChainError, match=problem):
        parse_chain(f"throttle:{options}|null:1G")


def test_it_holds_back_through_the_real_loop(machine: Machine) -> None:
    """In a worker's loop, requests come back late by the limit and with the status of the layer below."""
    chain = machine.open("throttle:iops=50|fault:op=write|ram:1M")
    began = machine.reactor.now()
    statuses = machine.do(chain, *(read(0, 512) for _ in range(15)), write(0, bytes(512)))
    took = machine.reactor.now() - began
    chain.close()

    assert [0] * 15 + [5] == statuses
    assert took > 0.18


@pytest.mark.parametrize(
    ("options", "full"),
    [("iops=1000,group=g", 1000), ("iops=4000,bps=4000K,group=g", 1000), ("bps=4000K,group=g", 1000)],
)
def test_a_member_of_a_group_goes_by_its_share(options: str, full: int) -> None:
    """A member of a group begins with a small share. When its share grows, waiting requests pass sooner; all its limits
    scale with the share.
    """
    load = Load(options)
    load.keep_up([read(place * 4096, 4096) for place in range(64)], 1)
    assert abs(len(load.keep_up([], 8)) - 8 * full / 16) <= 0.02 * 8 * full / 16
    for share in (0.25, 1.0, 0.01):
        assert b"" == load.driver.control("share", [str(share)])
        load.keep_up([], 1)
        seconds = 2 / share
        done = len(load.keep_up([], seconds))
        assert abs(done - full * share * seconds) <= max(2, 0.02 * full * share * seconds)
        assert round(1e6 * share) == load.driver.figures()["share_ppm"]


def test_a_raised_share_lets_go_at_once() -> None:
    """When the share grows, a waiting request does not wait for the timer that was set for the smaller share."""
    load = Load("iops=10,group=g")
    load.driver.control("share", ["0.001"])
    load.checked.submit([read(place * 4096, 4096) for place in range(12)])
    before = len(load.bottom.done)
    load.driver.control("share", ["1"])
    load.env.run(load.env.time + 1.0)

    assert len(load.bottom.done) >= before + 1


def test_a_successor_keeps_the_share() -> None:
    """D11: a successor keeps the share until it gets another one. A disk without a group has no share."""
    load = Load("iops=1000,group=g")
    load.driver.control("share", ["0.5"])
    later = Load("iops=1000,group=g", load.env)

    assert 500_000 == later.driver.figures()["share_ppm"]
    assert "share_ppm" not in Load("iops=1000", load.env).driver.figures()


def test_what_was_let_pass_is_counted_in_time_of_the_whole_limit() -> None:
    """`spent_ms` counts passed requests in time at the whole limit, so the service knows what a disk uses even if it is
    not held back.
    """
    load = Load("iops=1000,bps=40M,group=g")
    load.driver.control("share", ["0.5"])
    for _ in range(100):
        load.checked.submit([read(0, 4096)])
        load.env.run(load.env.time + 0.01)

    assert abs(load.driver.figures()["spent_ms"] - 100) <= 2
    assert 0 == load.driver.figures()["held"]


@pytest.mark.parametrize("arguments", [[], ["0"], ["1.5"], ["nan"], ["-1"], ["x"], ["0.5", "0.5"]])
def test_odd_shares_are_refused(arguments: list[str]) -> None:
    """A share must be a number above 0 and at most 1. A disk without a group does not know the verb."""
    with pytest.raises(DriverError, match="a share must be a number above 0, and at most 1"):
        Load("iops=10,group=g").driver.control("share", arguments)
    with pytest.raises(DriverError, match="does not know the verb 'share'"):
        Load("iops=10").driver.control("share", ["0.5"])


@pytest.mark.parametrize("left", ["nan", "inf", "-inf", "1e300", "-1"])
def test_what_a_predecessor_left_is_not_believed(left: str) -> None:
    """A predecessor may be taken over by its guest. Whatever it left, its successor keeps the limit and never hangs.

    The guest gets the first share, and what it has used up is forgotten.
    """
    former = Load("iops=160,group=g")
    for memory in former.env.memories.values():
        for place in range(len(memory) // 8):
            memoryview(memory).cast("d")[place] = float(left)
    load = Load("iops=160,group=g", former.env)
    assert 62_500 == load.driver.figures()["share_ppm"]
    load.keep_up([read(place * 4096, 4096) for place in range(64)], 1)

    assert abs(len(load.keep_up([], 10)) - 100) <= 2
