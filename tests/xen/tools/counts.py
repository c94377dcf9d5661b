"""What a load costs in calls and notifications: counted by the hypervisor and by Linux, not by the programs counted.

Must not measure time, nor know what a backend is.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.xen.tools.command import run, until

TRACEFS = Path("/sys/kernel/tracing")
INTERRUPTS = Path("/proc/interrupts")
SYSTEM_CALLS = TRACEFS / "events/raw_syscalls/sys_enter"
# Xen's public/trace.h: a hypercall of a PV domain, one that is part of a multicall, and records that were lost.
HYPERCALL, SUBCALL, LOST = 0x0020100D, 0x0020200E, 0x0001F001
_HISTOGRAM = "hist:keys=common_pid,id.syscall:size=8192"
_ENTRY = re.compile(r"\{ common_pid: *(?P<thread>\d+), id: (?:sys_)?(?P<call>\w+) .*\} hitcount: *(?P<count>\d+)")
_MASK, _PAGES = 0x00203000, 1024  # what PV domains do; the buffer of each CPU
# Xen's public/xen.h
GRANT_TABLE_OP, EVENT_CHANNEL_OP = 20, 32
_NOTIFIED = re.compile(r"(?<=\s)(blkif|evtchn:).*")  # the name of an interrupt in /proc/interrupts
_OTHER_PROGRAMS = ("evtchn:xenstored", "evtchn:oxenstored", "evtchn:xenconsoled", "evtchn:xentrace")


@dataclass(slots=True)
class Counts:
    """What was counted.

    Attributes:
        hypercalls: by their number, of all of dom0, the frontend's included.
        system_calls: by their name, of the processes asked for.
        notifications: that dom0 took: those of its blkfront, of blkback, and of programs that have event channels.
    """

    hypercalls: Counter[int] = field(default_factory=Counter)
    system_calls: Counter[str] = field(default_factory=Counter)
    notifications: int = 0


@contextmanager
def counted(pids: Iterable[int], trace: Path) -> Iterator[Counts]:
    """Count what happens while the block lasts; the result is complete after it.

    Args:
        pids: the processes whose system calls count.
        trace: a file for the hypervisor's records, which is removed; on a tmpfs, so that writing it takes no disk.
    """
    counts = Counts()
    trigger = SYSTEM_CALLS / "trigger"
    if not trigger.exists():
        run("mount", "-t", "tracefs", "tracefs", TRACEFS)
    hypervisor = subprocess.Popen(["xentrace", "-D", "-e", f"{_MASK:#x}", "-S", str(_PAGES), str(trace)])
    until("xentrace writes", lambda: trace.exists() and trace.stat().st_size > 0)
    trigger.write_text(_HISTOGRAM)
    before = notifications(INTERRUPTS.read_text())
    try:
        yield counts
    finally:
        counts.notifications = notifications(INTERRUPTS.read_text()) - before
        counts.system_calls = _system_calls(pids)
        trigger.write_text(f"!{_HISTOGRAM}")
        hypervisor.send_signal(signal.SIGTERM)
        hypervisor.wait()
    counts.hypercalls = hypercalls(trace.read_bytes())
    trace.unlink()


def hypercalls(trace: bytes) -> Counter[int]:
    """Return how often each hypercall was made, by the records of xentrace.

    A record is a word with the event (28 bits), how many words follow (3), and whether the time does (1), of 64 bits,
    before them (`struct t_rec` in Xen's public/trace.h). Raises: AssertionError, if records were lost.
    """
    found: Counter[int] = Counter()
    at, end = 0, len(trace)
    word = struct.Struct("<I").unpack_from
    while at < end:
        (head,) = word(trace, at)
        event, extra, has_time = head & 0xFFF_FFFF, head >> 28 & 7, head >> 31
        at += 4 + 8 * has_time
        assert event != LOST, "the hypervisor lost records: its buffers are too small"
        if event in (HYPERCALL, SUBCALL):
            found[word(trace, at)[0] & 0xFFFFF] += 1  # above it: which arguments follow
        at += 4 * extra
    return found


def _system_calls(pids: Iterable[int]) -> Counter[str]:
    """Return how often the processes, with all their threads, have made each call since the trigger was set."""
    threads = {task for pid in pids for task in os.listdir(f"/proc/{pid}/task")}
    return system_calls((SYSTEM_CALLS / "hist").read_text(), threads)


def system_calls(histogram: str, threads: Collection[str]) -> Counter[str]:
    """Return how often the threads have made each call, by the text of the histogram."""
    found: Counter[str] = Counter()
    for line in histogram.splitlines():
        if (entry := _ENTRY.match(line)) and entry["thread"] in threads:
            found[entry["call"]] += int(entry["count"])
    return found


def notifications(interrupts: str) -> int:
    """Return how many are counted in the text of /proc/interrupts; see `Counts.notifications`."""
    total = 0
    for line in interrupts.splitlines()[1:]:
        found = _NOTIFIED.search(line)  # a program's name may have a space
        if found and found[0] not in _OTHER_PROGRAMS:
            total += sum(int(word) for word in line[: found.start()].split()[1:] if word.isdigit())
    return total
