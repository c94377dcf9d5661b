"""Loops that use the CPUs beside what is measured."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xenbackend.bench import beside
from xenbackend.bench.beside import Loops
from xenbackend.errors import ConfigError

pytestmark = pytest.mark.slow  # each starts processes


@pytest.mark.parametrize("kind", beside.NICE)
def test_a_loop_on_each_cpu(tmp_path: Path, kind: str) -> None:
    """Each of our CPUs has one loop, bound to it, with the right nice value, in our session."""
    if os.getpriority(os.PRIO_PROCESS, 0) >= 19:
        pytest.skip("these tests run at nice 19 themselves")
    loops = Loops(kind, tmp_path)
    try:
        pids = [loop.pid for loop in loops._loops]
        nice = 19 if kind == "nice19" else os.getpriority(os.PRIO_PROCESS, 0)
        while loops.cpu_time() < 0.2 or any(nice != os.getpriority(os.PRIO_PROCESS, pid) for pid in pids):
            select.select([], [], [], 0.01)

        assert [{cpu} for cpu in sorted(os.sched_getaffinity(0))] == [os.sched_getaffinity(pid) for pid in pids]
        assert [nice] * len(pids) == [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids]
        assert {os.getsid(0)} == {os.getsid(pid) for pid in pids}
    finally:
        loops.close()
    assert [False] * len(pids) == [Path(f"/proc/{pid}").exists() for pid in pids]


def test_loops_that_would_be_nothing_special_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the bench itself has the lowest priority, loops of a lower one are refused."""
    monkeypatch.setattr(os, "getpriority", lambda *_: 19)
    with pytest.raises(ConfigError, match="the bench itself runs at nice 19"):
        Loops("nice19", tmp_path)


def test_loops_end_with_a_bench_that_was_killed(tmp_path: Path) -> None:
    """The loops end if the bench is killed."""
    code = (
        "import sys; from pathlib import Path; from xenbackend.bench.beside import Loops\n"
        f"loops = Loops('equal', Path({str(tmp_path)!r}))\n"
        "print(*[loop.pid for loop in loops._loops], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stdout is not None
        ends = [os.pidfd_open(int(pid)) for pid in bench.stdout.readline().split()]
        bench.send_signal(signal.SIGKILL)
    for end in ends:
        assert [end] == select.select([end], [], [], 10)[0]
        os.close(end)
