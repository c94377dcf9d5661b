"""The CPU time that a process got, and wanted, from the running kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.descriptors import open_descriptors
from xenbackend.kernel.cpu import Cpu, CpuTimes

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
    """Start a process that wants one CPU for 0.3 s, and prints what it got."""
    return subprocess.Popen([sys.executable, "-c", _WATCHED, str(cpu)], stdout=subprocess.PIPE, text=True)


def test_who_shares_a_cpu_waits_as_long_as_it_runs() -> None:
    """Two processes that want the same CPU each know how long they ran and how long they waited."""
    cpu = min(os.sched_getaffinity(0))
    found = [[int(word) for word in each.communicate()[0].split()] for each in [watched(cpu), watched(cpu)]]

    for ran, waited, passed in found:
        assert 0.9 * passed < ran + waited < 1.1 * passed
    assert sum(waited for _, waited, _ in found) > 60e6


def test_times_go_on() -> None:
    """The process's own time is counted in nanoseconds; the host's ticks are of all CPUs."""
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


def test_which_numbers_these_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stolen time is the eighth number; a guest's time, which follows, is already contained in the first two."""
    cpu = Cpu()
    texts = {cpu._own: b"12 34 56\n", cpu._host: b"cpu  1 2 3 4 5 6 7 8 1 2\ncpu0 1 2 3 4 5 6 7 8 1 2\n"}
    monkeypatch.setattr(os, "pread", lambda fd, _length, _offset: texts[fd])
    times = cpu.times()
    cpu.close()

    assert CpuTimes(ran_ns=12, waited_ns=34, stolen=8, all=36) == times


def test_files_stay_open_and_are_closed() -> None:
    """Reading opens no file, so that a process at its limit of descriptors can read on; closing leaves nothing."""
    before = open_descriptors()
    cpu = Cpu()
    opened = open_descriptors()
    cpu.times()

    assert opened == open_descriptors()
    cpu.close()
    assert before == open_descriptors()


def test_a_kernel_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without schedstats and delay accounting the kernel's file has zeros, which counts as no support."""
    before = open_descriptors()
    monkeypatch.setattr(os, "pread", lambda *_: b"0 0 0\n")
    with pytest.raises(OSError, match="does not count"):
        Cpu()

    assert before == open_descriptors()
