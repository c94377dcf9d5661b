"""What a process got of the CPUs, from the running kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from xenbackend.kernel.cpu import Cpu

_WATCHED = """
import os, sys, time
from xenbackend.kernel.cpu import Cpu
os.sched_setaffinity(0, {int(sys.argv[1])})
cpu = Cpu()
before, begin = cpu.times(), time.monotonic_ns()
while time.monotonic_ns() < begin + 300_000_000:
    pass
after, end = cpu.times(), time.monotonic_ns()
print(after.ran_ns - before.ran_ns, after.waited_ns - before.waited_ns, end - begin)
"""


def watched(cpu: int) -> subprocess.Popen[str]:
    """Start a process that wants one CPU for 0.3 s, and says what it got of it."""
    return subprocess.Popen([sys.executable, "-c", _WATCHED, str(cpu)], stdout=subprocess.PIPE, text=True)


def test_who_shares_a_cpu_waits_as_long_as_it_runs() -> None:
    """Two processes that want the same CPU each get a part, and know how long they wanted more."""
    cpu = min(os.sched_getaffinity(0))
    found = [[int(word) for word in each.communicate()[0].split()] for each in [watched(cpu), watched(cpu)]]

    for ran, waited, passed in found:
        assert 0.9 * passed < ran + waited < 1.1 * passed
    assert sum(waited for _, waited, _ in found) > 60e6


def test_times_go_on() -> None:
    """What ran is counted in nanoseconds, and the host's ticks are of all CPUs."""
    cpu = Cpu()
    try:
        before, end = cpu.times(), time.process_time() + 0.05
        while time.process_time() < end:
            pass
        after = cpu.times()
    finally:
        cpu.close()

    assert after.ran_ns - before.ran_ns >= 40e6
    assert after.all > before.all
    assert after.stolen >= before.stolen


def test_files_stay_open_and_are_closed() -> None:
    """Reading opens nothing: a process that may open no files any more reads on."""
    cpu = Cpu()
    before = sorted(os.listdir("/proc/self/fd"))
    cpu.times()

    assert before == sorted(os.listdir("/proc/self/fd"))
    cpu.close()
