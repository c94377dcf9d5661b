"""Whether the host's CPUs have something better to do than to wait.

Must not be asked more than about once a second: it reads a file.
"""

from __future__ import annotations

import os

_CPUS = os.cpu_count() or 1


def has_idle_cpu() -> bool:
    """Return whether fewer threads want to run now, ourselves included, than there are CPUs, or just as many.

    Source: proc(5), /proc/loadavg, fourth field: currently runnable / existing.
    """
    fd = os.open("/proc/loadavg", os.O_RDONLY)
    try:
        runnable = os.read(fd, 128).split()[3].partition(b"/")[0]
    finally:
        os.close(fd)
    return int(runnable) <= _CPUS
