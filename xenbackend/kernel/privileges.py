"""Gives up the privileges of a process: its user, groups and capabilities, and the means to regain them.

Must not decide which process gives up what, nor in which order: `walls` does. Everything here affects the calling
thread only, so it must be called while the process has one thread.

Sources: credentials(7), capabilities(7), capset(2); prctl(2) for the numbers, as in linux/prctl.h.
"""

from __future__ import annotations

import ctypes
import os
import struct

from xenbackend.errors import KernelError

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION = 0x20080522  # linux/capability.h, _LINUX_CAPABILITY_VERSION_3: two words of each set

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def become(uid: int) -> None:
    """Become this user, in the group of the same number and no other one. Raises: KernelError."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise KernelError(f"become user {uid}", error.errno or 0) from None


def drop_capabilities() -> None:
    """Drop all capabilities, also those that a program started from here would inherit. Raises: KernelError."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    if _libc.capset(header, bytes(24)) < 0:  # effective, permitted, inheritable: two words each
        raise KernelError("drop all capabilities", ctypes.get_errno())
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, "drop the ambient capabilities")


def refuse_new_privileges() -> None:
    """Make sure that no program started from here gets more rights than this process. Raises: KernelError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "refuse new privileges (PR_SET_NO_NEW_PRIVS)")


def refuse_dumps() -> None:
    """Forbid all users but root, also our own, to read our memory or trace us. Raises: KernelError."""
    _prctl(_PR_SET_DUMPABLE, 0, "refuse dumps (PR_SET_DUMPABLE)")


def _prctl(option: int, value: int, operation: str) -> None:
    if _libc.prctl(option, value, 0, 0, 0) < 0:
        raise KernelError(operation, ctypes.get_errno())
