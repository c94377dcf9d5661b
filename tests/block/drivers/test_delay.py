"""The driver delay."""

from __future__ import annotations

import pytest

from tests.helpers_block import Bottom, Machine, StepEnv, discard, flush, read, write
from xenbackend.block.driver import Geometry
from xenbackend.block.drivers.delay import Delay


def opened(**options: float) -> tuple[Delay, StepEnv, Bottom]:
    """Return an open driver with the clock and the source below it."""
    driver, env, bottom = Delay(Delay.Options(**options)), StepEnv(), Bottom()
    driver.env, driver.next, driver.below = env, bottom, Geometry(1 << 20)
    driver.open(env)
    return driver, env, bottom


def test_each_operation_waits_for_its_own_time() -> None:
    """Requests with the same delay go down as one batch when it has passed, and those without a delay go at once."""
    driver, env, bottom = opened(read=0.005, write=0.010)
    reads, writes, others = [read(0, 512), read(512, 512)], [write(0, bytes(512))], [flush(), discard(0, 512)]
    driver.submit([reads[0], writes[0], others[0], reads[1], others[1]])

    assert [others] == bottom.batches
    assert [0.005, 0.010] == [delay for delay, _ in env.timers]
    env.ring()
    assert [others, reads, writes] == bottom.batches


def test_jitter_is_bounded_and_repeatable() -> None:
    """With jitter, each request waits up to `jitter` longer. The delays are the same for the same seed."""
    times = []
    for seed in (1, 1, 2):
        driver, env, _ = opened(read=0.005, jitter=0.002, seed=seed)
        driver.submit([read(0, 512) for _ in range(50)])
        times.append([delay for delay, _ in env.timers])

    assert times[0] == times[1]
    assert times[0] != times[2]
    assert all(0.005 <= delay < 0.007 for delay in times[0])
    assert len(set(times[0])) == 50


@pytest.mark.parametrize("text", ["delay:|null:", "delay:read=1us,write=1us,flush=1us,jitter=1us|null:"])
def test_requests_come_back_through_the_real_loop(machine: Machine, text: str) -> None:
    """Delayed requests come back with the status of the layer below."""
    chain = machine.open(text)

    assert [0, 0, 0] == machine.do(chain, read(0, 512), write(0, bytes(512)), flush())
    chain.close()
