"""What the kernel and the hypervisor said since a moment, and which of it is a complaint.

Must not clear a log: they are kept as a whole beside the results.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import ClassVar

from tests.xen.tools.command import run

_ERROR = 3  # KERN_ERR; smaller is worse
_ALARMING = re.compile(
    r"BUG|WARNING|Oops|Call Trace|hung task|I/O error|rcu: INFO|refcount|leak"
    r"|type=1326",  # linux/audit.h, AUDIT_SECCOMP: a filter of system calls has killed a process
    re.IGNORECASE,
)
_HARMLESS = [  # what this machine says however the disks are served
    r"clocksource: .*",
    r"hrtimer: interrupt took \d+ ns",
]


class KernelLog:
    """Dom0's kernel log from now on (`/dev/kmsg`, Linux Documentation/ABI/testing/dev-kmsg)."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)
        self.lines: list[str] = []
        self._complaints: list[str] = []

    def _update(self) -> None:
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # overwritten before it was read: the next one follows
            head, _, rest = record.partition(";")
            line = rest.partition("\n")[0]
            self.lines.append(line)
            if int(head.split(",")[0]) & 7 <= _ERROR or _ALARMING.search(line):
                self._complaints.append(line)

    def complaints(self, allowed: Iterable[str] = ()) -> list[str]:
        """Return the lines that are errors or sound like one, but for what matches one of `allowed`."""
        self._update()
        return _without(self._complaints, [*_HARMLESS, *allowed])

    def close(self) -> None:
        """Stop reading."""
        os.close(self._fd)


class XenLog:
    """The hypervisor's log from now on. Booted with loglvl=warning: whatever comes is a complaint."""

    _seen: ClassVar[int | None] = None  # lines that were there when it was last looked at, which takes a while

    def __init__(self) -> None:
        if XenLog._seen is None:
            XenLog._seen = len(_xen_dmesg())
        self._before = XenLog._seen

    @property
    def lines(self) -> list[str]:
        """What came since, and since the log was looked at before."""
        lines = _xen_dmesg()
        XenLog._seen = len(lines)
        return lines[self._before :]

    def complaints(self, allowed: Iterable[str] = ()) -> list[str]:
        """Return what came since, but for what matches one of `allowed`."""
        return _without(self.lines, allowed)


def _xen_dmesg() -> list[str]:
    return run("xl", "dmesg").out.splitlines()


def _without(lines: Iterable[str], allowed: Iterable[str]) -> list[str]:
    patterns = [re.compile(each) for each in allowed]
    return [line for line in lines if not any(pattern.search(line) for pattern in patterns)]
