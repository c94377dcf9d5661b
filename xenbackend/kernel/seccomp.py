"""seccomp: a process that the kernel lets make few system calls, for all of its threads at once and for good.

Must not decide which: it loads a program (`walls.filter`), as bytes.

Source: seccomp(2); linux/seccomp.h, linux/audit.h.
"""

from __future__ import annotations

import ctypes
import errno
import platform

from xenbackend.errors import KernelError

INSTRUCTION = 8  # bytes; linux/filter.h, struct sock_filter
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
_SET_MODE_FILTER = 1
_FLAG_TSYNC = 1
_SYSCALLS = {"x86_64": 317, "aarch64": 277}

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def load(program: bytes) -> None:
    """Have every thread of this process obey a program. The process has to refuse new privileges already.

    Raises: KernelError; ESRCH where a thread has other filters than we, ENOSYS on a machine that is not known.
    """
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise KernelError(f"filter system calls on {platform.machine()}", errno.ENOSYS)
    filters = _Program(len(program) // INSTRUCTION, program)
    done = _libc.syscall(number, _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(filters))
    if done:  # the number of a thread that cannot follow is positive
        raise KernelError("filter system calls (seccomp)", ctypes.get_errno() if done < 0 else errno.ESRCH)
