"""Landlock: a process gives up opening anything by a name, whatever its user may do.

Must not allow anything: a Landlock domain made here has no rules. Open descriptors stay open, with all their rights.

The restriction holds for the calling thread and the threads that it starts.

Source: Linux, ``Documentation/userspace-api/landlock.rst``; linux/landlock.h. The system calls have the same numbers
on every architecture.
"""

from __future__ import annotations

import ctypes
import os
import struct

from xenbackend.errors import KernelError

_SYS_CREATE_RULESET, _SYS_RESTRICT_SELF = 444, 446
_ASK_VERSION = 1
# The number of rights that each version of the interface knows: a kernel refuses those that it does not know.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # later versions as 5: from execute to ioctl on devices
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
_NETWORK_RIGHTS = 0b11  # bind and connect by TCP; from version 4 on
_SCOPES = 0b11  # abstract Unix sockets, signals; from version 6 on
_NETWORK_SINCE, _SCOPES_SINCE = 4, 6

_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Return the version of the kernel's Landlock; 0 if it has none, or it is not enabled."""
    return max(0, int(_libc.syscall(_SYS_CREATE_RULESET, None, 0, _ASK_VERSION)))


def restrict(*, network: bool = False, reading: bool = False) -> None:
    """Give up every right that this kernel's Landlock knows; `network` and `reading` keep those kinds of rights.

    The process must have refused new privileges before.

    Raises: KernelError; ENOSYS or EOPNOTSUPP if the kernel has no Landlock.
    """
    found = _libc.syscall(_SYS_CREATE_RULESET, None, 0, _ASK_VERSION)
    if found < 0:
        raise KernelError("use Landlock", ctypes.get_errno())
    attributes = _attributes(found, network=network, reading=reading)
    ruleset = _libc.syscall(_SYS_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        raise KernelError("make a Landlock ruleset", ctypes.get_errno())
    try:
        if _libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0) < 0:
            raise KernelError("restrict ourselves by Landlock", ctypes.get_errno())
    finally:
        os.close(ruleset)


def _attributes(found: int, *, network: bool, reading: bool) -> bytes:
    """Return a `landlock_ruleset_attr` with as many words as version `found` has."""
    rights = _FILE_RIGHTS.get(found, _FILE_RIGHTS[max(_FILE_RIGHTS)])
    words = [((1 << rights) - 1) & ~(_READ_FILE | _READ_DIRECTORY if reading else 0)]
    if found >= _NETWORK_SINCE:
        words.append(0 if network else _NETWORK_RIGHTS)
    if found >= _SCOPES_SINCE:
        words.append(_SCOPES)
    return struct.pack(f"={len(words)}Q", *words)
