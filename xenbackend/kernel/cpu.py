"""How much CPU time this process got, and how long it waited for a CPU.

Must not judge the figures. The files are opened once, so that a process behind walls can still read them.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Times since the process or the host started."""

    ran_ns: int  # this process's main thread was running
    waited_ns: int  # this process's main thread was ready to run, but others ran
    stolen: int  # ticks of all CPUs in which the hypervisor ran another machine
    all: int  # ticks of all CPUs


class Cpu:
    """Reads the times of this process's main thread and of the host.

    Sources: Linux, ``Documentation/scheduler/sched-stats.rst``, "/proc/<pid>/schedstat"; proc(5), /proc/stat.
    """

    def __init__(self) -> None:
        """Open the files. Raises: OSError if they are missing (CONFIG_SCHED_INFO), or the kernel does not count."""
        self._own = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.pread(self._own, 128, 0).split()[2] == b"0":  # it runs, yet was never given a CPU: delayacct is off
                raise OSError(errno.ENODATA, "the kernel does not count how long processes wait for a CPU")
            self._host = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._own)
            raise

    def times(self) -> CpuTimes:
        """Return the current times; takes a few microseconds. Raises: OSError."""
        ran, waited, *_ = os.pread(self._own, 128, 0).split()
        ticks = [int(word) for word in os.pread(self._host, 512, 0).partition(b"\n")[0].split()[1:9]]
        return CpuTimes(int(ran), int(waited), ticks[7], sum(ticks))

    def close(self) -> None:
        """Close the files."""
        os.close(self._own)
        os.close(self._host)
