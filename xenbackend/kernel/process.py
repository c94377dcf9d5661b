"""A process's place among others: its name, which orphans it adopts, its priority on a busy host, its end by force.

Must not start one, nor decide who comes first.

Where Linux groups tasks by session (sched(7), "The autogroup feature"), a nice value counts only within its session,
and every session has an equal share. So the nice value of the group is set too, for a process that leads one.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xenbackend.errors import KernelError

AHEAD = 10  # nice values
_NORMAL = os.getpriority(os.PRIO_PROCESS, 0)  # as we were started
_LEAST = -20  # nice value
_PR_SET_NAME = 15  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Be the parent of every descendant whose own parent ends while the context lasts. Raises: KernelError."""
    _set_subreaper(1)
    try:
        yield
    finally:
        _set_subreaper(0)


def rename(name: str) -> None:
    """Have this process called so by ps(1), top(1) and `kernel.users`: its first 15 bytes. Raises: KernelError."""
    if _libc.prctl(_PR_SET_NAME, name.encode(errors="surrogateescape"), 0, 0, 0) < 0:
        raise KernelError("have a name (PR_SET_NAME)", ctypes.get_errno())


def kill(pidfd: int) -> None:
    """Kill a process, if it is still there."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def boost(pid: int) -> None:
    """Give a process priority over the rest of the host, until `unboost`; does nothing if the host forbids it."""
    _set_nice(pid, AHEAD)


def unboost(pid: int) -> None:
    """Give a process normal priority again."""
    _set_nice(pid, 0)


def _set_nice(pid: int, ahead: int) -> None:
    if pid <= 0:  # it has gone, and its number is not known any more
        return
    nice = max(_LEAST, _NORMAL - ahead)
    with suppress(OSError):
        if os.getsid(pid) != pid:
            os.setpriority(os.PRIO_PROCESS, pid, nice)
            return
        os.setpriority(os.PRIO_PGRP, pid, nice)  # of PRIO_PROCESS the threads that it has started would hear nothing
        Path(f"/proc/{pid}/autogroup").write_text(f"{-ahead}\n", encoding="ascii")  # a session begins with 0


def _set_subreaper(value: int) -> None:
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, value, 0, 0, 0) < 0:
        raise KernelError("adopt processes (PR_SET_CHILD_SUBREAPER)", ctypes.get_errno())
