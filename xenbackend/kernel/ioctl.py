"""ioctl request numbers, and the call that turns an errno into a `KernelError`.

Must not know a device.
"""

from __future__ import annotations

import fcntl

from xenbackend.errors import KernelError


def number(kind: str, nr: int, size: int) -> int:
    """Return the number that `_IOC(_IOC_NONE, kind, nr, size)` has in C. Source: asm-generic/ioctl.h."""
    return size << 16 | ord(kind) << 8 | nr


def call(fd: int, request: int, argument: bytearray | bytes | int, operation: str) -> int:
    """Call ioctl and return its result (0 if `argument` is `bytes`); a bytearray is changed in place.

    Args:
        fd: the device.
        request: the ioctl's number.
        argument: the structure to which the argument points, or a plain number.
        operation: the call in words, for the error.

    Raises: KernelError.
    """
    try:
        result = fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise KernelError(operation, error.errno or 0) from error
    return result if isinstance(result, int) else 0
