"""How much of the host's CPUs this process got, and how long it waited for one.

Must not judge. The files are opened once: a process that is sandboxed later can still read them.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Times since the process, or the host, began."""

    ran_ns: int  # this process's main thread
    waited_ns: int  # the same, while it was ready to run and others did
    stolen: int  # ticks in which the hypervisor ran somebody else, of all CPUs
    all: int  # ticks of all CPUs


class Cpu:
    """Reads the times of this process's main thread and of the host.

    Sources: Linux, ``Documentation/scheduler/sched-stats.rst``, "/proc/<pid>/schedstat"; proc(5), /proc/stat.
    """

    def __init__(self) -> None:
        """Open the files. Raises: OSError, if the kernel has none (CONFIG_SCHED_INFO) or does not count."""
        self._own = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.pread(self._own, 128, 0).split()[2] == b"0":  # it runs, and was never given a CPU: delayacct is off
                raise OSError(errno.ENODATA, "the kernel does not count how long processes wait for a CPU")
            self._host = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._own)
            raise

    def times(self) -> CpuTimes:
        """Return the current times; takes some microseconds. Raises: OSError."""
        ran, waited, *_ = os.pread(self._own, 128, 0).split()
        ticks = [int(word) for word in os.pread(self._host, 512, 0).partition(b"\n")[0].split()[1:9]]
        return CpuTimes(int(ran), int(waited), ticks[7], sum(ticks))

    def close(self) -> None:
        """Release the files."""
        os.close(self._own)
        os.close(self._host)
