"""Processes that take turns at what the host can bear only once at a time.

Must not know what that is, nor keep anybody waiting whose process has ended: the kernel gives its turn away.

There is a door before the turn, where one waits; the others wait for the door. So whoever has had a turn and wants the
next one at once finds somebody before him, and nobody is kept waiting for ever by one who comes again and again.

Source: flock(2).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

_DOOR = ".door"  # behind the name of the file


@contextmanager
def in_turn(path: str) -> Iterator[None]:
    """Have one's turn among all who name this file, which is made where it is not there; sleeps until then.

    Without a path there is nobody else. Raises: OSError.
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
    """Give the descriptor of a file that is locked until it is closed; whoever takes it out of the list closes it."""
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
