"""What else used the CPUs, and when that makes a conclusion impossible."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.bench.disturbance import MOST_FOREIGN, MOST_STOLEN, Look, Usage, _Process, between, look

QUIET = Usage(foreign=0.02, kernel=0.3, interrupts=0.2, stolen=0.0, programs=[], autogroup=True)


def make_look(at: float, programs: float, ours: float, *processes: tuple[int, str, int, float]) -> Look:
    """A look; processes are (pid, name, parent, seconds)."""
    table = {(pid, 0): _Process(name, parent, seconds) for pid, name, parent, seconds in processes}
    return Look(at, programs, 0.0, 0.0, ours, table)


@pytest.mark.parametrize(
    ("foreign", "stolen", "expected"),
    [
        (MOST_FOREIGN, MOST_STOLEN, []),
        (0.31, 0.0, ["other programs used 0.31 CPUs (at most 0.1)"]),
        (0.0, 0.07, ["the hypervisor gave 0.07 CPUs to others (at most 0.05)"]),
    ],
)
def test_when_nothing_can_be_concluded(foreign: float, stolen: float, expected: list[str]) -> None:
    """A session is spoilt if other programs use more than a tenth of a CPU, or the hypervisor takes half of that."""
    assert expected == Usage(foreign, 0.5, 0.5, stolen, [], autogroup=False).disturbances


def test_what_the_kernel_does_is_no_disturbance() -> None:
    """Kernel threads and interrupts work for what is measured: they are reported, but are no disturbance."""
    assert [] == QUIET.disturbances


def test_programs_are_named_by_what_they_used_meanwhile() -> None:
    """Processes of one name are one program; only CPU time within the interval counts, of new processes too."""
    before = make_look(100, 50, 10, (5, "make", 1, 30.0), (6, "cc1", 5, 4.0))
    after = make_look(110, 70, 12, (5, "make", 1, 31.0), (7, "cc1", 5, 6.0), (8, "cc1", 5, 3.0))
    usage = between(before, after)

    assert [("cc1", 0.9), ("(ended meanwhile)", 0.8), ("make", 0.1)] == usage.programs
    assert 1.8 == usage.foreign


def test_kernel_threads_are_apart() -> None:
    """Children of kthreadd do not count as programs."""
    before = make_look(0, 0, 0, (2, "kthreadd", 0, 0.0), (9, "kworker/0:1", 2, 1.0))
    usage = between(before, make_look(10, 8, 3, (2, "kthreadd", 0, 0.0), (9, "kworker/0:1", 2, 5.0)))

    assert (0.1, 0.4, ["(ended meanwhile)"]) == (usage.foreign, usage.kernel, [name for name, _ in usage.programs])


def test_a_number_that_was_used_again_is_another_process() -> None:
    """A process is identified by its pid and its start, so a reused pid is another process."""
    before = make_look(0, 0, 0, (5, "long", 1, 30.0))
    after = Look(10, 2, 0, 0, 0, {(5, 77): _Process("short", 1, 2.0)})

    assert [("short", 0.2)] == between(before, after).programs


def test_only_the_busiest_are_named() -> None:
    """Only the busiest programs are listed, and none that used next to nothing."""
    processes = [(pid, f"p{pid}", 1, pid / 100) for pid in range(10, 1000)]
    usage = between(make_look(0, 0, 0), make_look(10, sum(each[3] for each in processes), 0, *processes))

    assert ["p999", "p998", "p997", "p996", "p995"] == [name for name, _ in usage.programs]
    assert [] == between(make_look(0, 0, 0), make_look(10, 0.04, 0, (5, "idle", 1, 0.04))).programs


@pytest.fixture
def busy() -> Iterator[int]:
    """A process with an odd name that has used CPU time and waits to be ended."""
    name = "a) R 2 (b"  # what a careless reader of /proc/PID/stat takes for a state and a parent
    code = f"open('/proc/self/comm', 'w').write({name!r}); sum(range(10**7)); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate("\n")


@pytest.mark.slow
def test_what_is_read_from_proc(busy: int) -> None:
    """Every foreign process is read with name, parent and CPU time; our own are left out."""
    seen = look()
    found = {pid: process for (pid, _), process in seen.processes.items()}

    assert ("a) R 2 (b", os.getpid()) == (found[busy].name, found[busy].parent)
    assert found[busy].seconds > 0
    assert os.getpid() not in found
    assert seen.programs > seen.ours > 0


@pytest.mark.slow
def test_what_we_use_is_not_foreign() -> None:
    """CPU time used by us and our ended children does not count as foreign."""
    before = look()
    for code in (
        "sum(range(10**7))",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7))'])",
    ):
        subprocess.run([sys.executable, "-c", code], check=True)
    sum(range(10**7))
    after = look()
    ours = after.ours - before.ours

    assert ours > 0.1
    assert between(before, after).foreign * (after.at - before.at) <= after.programs - before.programs - ours + 0.05


def test_every_host_tells_about_autogroup() -> None:
    """The report says whether nice values count across sessions, or that the kernel has no autogroup."""
    file = Path("/proc/sys/kernel/sched_autogroup_enabled")

    assert (file.exists() and file.read_text() != "0\n") == between(look(), look()).autogroup
