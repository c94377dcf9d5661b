"""Lets processes take turns at work of which the host can bear only one at a time.

Must not know what the work is, nor let a process that has ended block others: the kernel releases its locks.

There are two locks: the door and the turn. One process holds the door while it waits for the turn; all others wait for
the door. So a process that has had a turn and wants another one queues behind the process at the door, and no process
waits for ever because another one comes again and again.

Source: flock(2).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

_DOOR = ".door"  # suffix of the file's name


@contextmanager
def in_turn(path: str) -> Iterator[None]:
    """Sleep until it is our turn among all processes that use this path, and hold it. A missing file is created.

    An empty path means that there is nobody to wait for. Raises: OSError.
    """
    if not path:
        yield
        return
    with _locked(f"{path}{_DOOR}") as door:
        turn = _lock(path)
        os.close(door.pop())
    try:
        yield
    finally:
        os.close(turn)


@contextmanager
def _locked(path: str) -> Iterator[list[int]]:
    """Lock a file, and yield a list with its descriptor. A caller that removes it from the list has to close it."""
    held = [_lock(path)]
    try:
        yield held
    finally:
        for fd in held:
            os.close(fd)


def _lock(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException:
        os.close(fd)
        raise
    return fd
