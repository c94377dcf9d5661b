"""seccomp: restricts the system calls of a process, for all its threads at once and for good.

Must not decide which calls are allowed: it loads a program made by `walls.filter`, as bytes.

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
    """Apply a filter program to every thread of this process, which must have refused new privileges before.

    Raises: KernelError; ESRCH if another thread has different filters, ENOSYS on an unknown architecture.
    """
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise KernelError(f"filter system calls on {platform.machine()}", errno.ENOSYS)
    filters = _Program(len(program) // INSTRUCTION, program)
    done = _libc.syscall(number, _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(filters))
    if done:  # a positive result is the number of a thread that could not be included
        raise KernelError("filter system calls (seccomp)", ctypes.get_errno() if done < 0 else errno.ESRCH)
