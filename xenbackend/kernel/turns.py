"""Processes that take turns at what the host can bear only once at a time.

Must not know what that is, nor keep anybody waiting whose process has ended: the kernel gives its turn away.

Source: flock(2).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def turn(path: str) -> Iterator[None]:
    """Have one's turn among all who name this file, which is made where it is not there; sleeps until then.

    Without a path there is nobody else. Raises: OSError.
    """
    if not path:
        yield
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
