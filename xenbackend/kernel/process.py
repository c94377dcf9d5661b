"""What can be set and asked about processes: name, parent of orphans, priority, kill, state, and open files.

Must not start a process, nor decide which one gets priority.

If Linux groups tasks by session (sched(7), "The autogroup feature"), a nice value counts only within its session, and
all sessions have equal shares. So for a session leader, the nice value of the group is set as well.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from dataclasses import dataclass

from xenbackend.errors import KernelError

AHEAD = 10  # by how much `boost` lowers the nice value
_NORMAL = os.getpriority(os.PRIO_PROCESS, 0)  # the nice value with which we were started
_LEAST = -20  # the lowest nice value
_PR_SET_NAME = 15  # linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PF_EXITING = 4  # linux/sched.h

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans(*, does: bool) -> None:
    """Become the parent of every descendant whose own parent ends, or stop doing so. Raises: KernelError."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, int(does), 0, 0, 0) < 0:
        raise KernelError("adopt processes (PR_SET_CHILD_SUBREAPER)", ctypes.get_errno())


def rename(name: str) -> None:
    """Set the name of this process that ps(1), top(1) and `kernel.users` show: the first 15 bytes of `name`.

    Raises: KernelError.
    """
    if _libc.prctl(_PR_SET_NAME, name.encode(errors="surrogateescape"), 0, 0, 0) < 0:
        raise KernelError("have a name (PR_SET_NAME)", ctypes.get_errno())


def end_with(parent: int, number: int) -> None:
    """Have signal `number` sent to us when our parent ends, or now if `parent` has ended. Raises: KernelError."""
    if _libc.prctl(_PR_SET_PDEATHSIG, number) < 0:
        raise KernelError("end with the parent (PR_SET_PDEATHSIG)", ctypes.get_errno())
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def kill(pidfd: int) -> None:
    """Kill a process, if it is still there."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def state_of(pid: int) -> str:
    """Return the state of a process as the letter in proc_pid_stat(5), empty if there is no such process."""
    try:
        return text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def is_ending(pid: int) -> bool:
    """Return whether a process has ended or is about to, even if the kernel still waits for what it has in flight.

    Also True if only its first thread has ended, and if nobody can tell, as when we have no descriptor left to look.
    """
    try:
        words = text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return words[0] in "ZX" or bool(int(words[6]) & _PF_EXITING)
    except (OSError, IndexError):
        return True


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that a process has open, as the kernel knows it without asking the file's own file system.

    path     without links
    device   of the mounted file system; the file's own st_dev may differ (btrfs)
    inode    its inode number
    """

    path: str
    device: int
    inode: int


def files_of(pidfd: int) -> list[OpenFile]:
    """Return the named files that a process has open; empty if the process has ended, and before Linux 5.14.

    The files themselves are not touched, so one on a server that does not answer blocks nobody.
    """
    try:
        pid = int(_fields(f"/proc/self/fdinfo/{pidfd}").get("Pid", "-1"))
        devices = _devices_of_mounts(f"/proc/{pid}/mountinfo")
        found = {}
        for each in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - as in `text_of`
            with suppress(OSError, KeyError, ValueError):  # closed meanwhile, or a pipe, which has no path
                path = os.readlink(f"/proc/{pid}/fd/{each}")  # noqa: PTH115 - pathlib would alter the name
                info = _fields(f"/proc/{pid}/fdinfo/{each}")
                if path.startswith("/"):
                    found[path] = OpenFile(path, devices[info["mnt_id"]], int(info["ino"]))
        signal.pidfd_send_signal(pidfd, 0)  # it still exists, so `pid` has not been reused
    except (OSError, ValueError):
        return []
    return list(found.values())


def text_of(path: str) -> str:
    """Return the content of a file in /proc. Raises: OSError."""
    with open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123 - each command imports this, but not pathlib
        return file.read()


def _fields(path: str) -> dict[str, str]:
    """Return the fields of a file in /proc/pid/fdinfo. Raises: OSError."""
    lines = text_of(path).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _devices_of_mounts(path: str) -> dict[str, int]:
    """Return the device number of each mount, by mount ID. Source: proc(5), /proc/pid/mountinfo. Raises: OSError."""
    found = {}
    for line in text_of(path).splitlines():
        mount, _, device = line.split(" ")[:3]
        major, _, minor = device.partition(":")
        found[mount] = os.makedev(int(major), int(minor))
    return found


def boost(pid: int) -> None:
    """Give a process priority over the rest of the host until `unboost`; does nothing if the host forbids it."""
    _set_nice(pid, AHEAD)


def unboost(pid: int) -> None:
    """Give a process normal priority again."""
    _set_nice(pid, 0)


def _set_nice(pid: int, ahead: int) -> None:
    if pid <= 0:  # it is gone, and its number is not known any more
        return
    nice = max(_LEAST, _NORMAL - ahead)
    with suppress(OSError):
        if os.getsid(pid) != pid:
            os.setpriority(os.PRIO_PROCESS, pid, nice)
            return
        os.setpriority(os.PRIO_PGRP, pid, nice)  # PRIO_PROCESS would not affect threads that it has started
        with open(f"/proc/{pid}/autogroup", "w", encoding="ascii") as file:  # noqa: PTH123 - as in `text_of`
            file.write(f"{-ahead}\n")  # a new session's value is 0
