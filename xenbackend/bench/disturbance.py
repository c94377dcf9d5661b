"""What else used the CPUs while a bench ran, and whether the bench's figures are valid.

Must not know what was measured. Everything is read from /proc before and after the bench, never during it.

Sources: proc(5), /proc/stat and /proc/PID/stat; sched(7), "The autogroup feature".
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice
from operator import itemgetter
from pathlib import Path

MOST_FOREIGN = 0.1  # CPUs used by other programs; with more than that, a session proves nothing
MOST_STOLEN = 0.05  # CPUs that the hypervisor gave to other machines
_NAMED = 5  # the number of busiest programs that are named
_SMALLEST = 0.005  # CPUs; programs that used less are not named
_PROCESSES = 20_000  # processes that are examined at most
_KTHREADD = 2  # pid of the parent of all kernel threads
_AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Process:
    name: str
    parent: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Look:
    """The CPU times up to one moment, in seconds of all CPUs together."""

    at: float
    programs: float  # user and system time of all processes
    interrupts: float
    stolen: float
    ours: float  # of this process and of its children that have ended
    processes: dict[tuple[int, int], _Process]  # by pid and start; without this one


@dataclass(frozen=True, slots=True)
class Usage:
    """What used the CPUs between two looks, in CPUs: 1.0 is one CPU all the time.

    foreign     other programs, without kernel threads and interrupts, which may well work for us
    kernel      kernel threads
    interrupts  hard and soft interrupts
    stolen      given to other machines by the hypervisor
    programs    the busiest of the other programs, by name; "(ended meanwhile)" for those that ended between the looks
    autogroup   whether Linux first shares the CPUs by session, so that nice values only count within a session
    """

    foreign: float
    kernel: float
    interrupts: float
    stolen: float
    programs: list[tuple[str, float]]
    autogroup: bool

    @property
    def disturbances(self) -> list[str]:
        """A clause for each reason why nothing can be concluded; empty if we had the machine to ourselves."""
        reasons = []
        if self.foreign > MOST_FOREIGN:
            reasons.append(f"other programs used {self.foreign:.2f} CPUs (at most {MOST_FOREIGN})")
        if self.stolen > MOST_STOLEN:
            reasons.append(f"the hypervisor gave {self.stolen:.2f} CPUs to others (at most {MOST_STOLEN})")
        return reasons


def look() -> Look:
    """Return the CPU times up to now; takes some milliseconds. No process that we have started may be running."""
    with Path("/proc/stat").open(encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    own = sum(os.times()[:4])
    interrupts = (irq + softirq) * _TICK
    return Look(time.monotonic(), (user + nice + system) * _TICK, interrupts, steal * _TICK, own, dict(_others()))


def _others() -> Iterator[tuple[tuple[int, int], _Process]]:
    for entry in islice(Path("/proc").iterdir(), _PROCESSES):
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "stat").read_text(errors="replace")
        except OSError:  # it has ended
            continue
        name = text[text.index("(") + 1 : text.rindex(")")]  # the name itself may contain parentheses
        fields = text[text.rindex(")") + 2 :].split()  # from the third field, "state", on
        seconds = (int(fields[11]) + int(fields[12])) * _TICK
        yield (int(entry.name), int(fields[19])), _Process(name, int(fields[1]), seconds)


def between(before: Look, after: Look) -> Usage:
    """Return what others used between two looks. Our own processes must have ended, and are counted as ours."""
    elapsed = max(after.at - before.at, _TICK)
    programs: defaultdict[str, float] = defaultdict(float)
    kernel = 0.0
    for key, process in after.processes.items():
        earlier = before.processes.get(key)
        used = process.seconds - (earlier.seconds if earlier else 0.0)
        if _KTHREADD in (key[0], process.parent):
            kernel += used
        else:
            programs[process.name] += used
    foreign = after.programs - before.programs - (after.ours - before.ours) - kernel
    programs["(ended meanwhile)"] = foreign - sum(programs.values())
    busiest = nlargest(_NAMED, programs.items(), key=itemgetter(1))
    return Usage(
        foreign=max(0.0, foreign / elapsed),
        kernel=kernel / elapsed,
        interrupts=(after.interrupts - before.interrupts) / elapsed,
        stolen=(after.stolen - before.stolen) / elapsed,
        programs=[(name, used / elapsed) for name, used in busiest if used > _SMALLEST * elapsed],
        autogroup=_has_autogroup(),
    )


def _has_autogroup() -> bool:
    try:
        return int(_AUTOGROUP.read_text()) != 0
    except (OSError, ValueError):  # the kernel has no autogroup
        return False
