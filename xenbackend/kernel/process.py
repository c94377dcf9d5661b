"""What a process is to those below it.

Must not start or end one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from xenbackend.errors import KernelError

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Be the parent of every descendant whose own parent ends meanwhile. Raises: KernelError."""
    _set_subreaper(1)
    try:
        yield
    finally:
        _set_subreaper(0)


def _set_subreaper(value: int) -> None:
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, value, 0, 0, 0) < 0:
        raise KernelError("adopt processes (PR_SET_CHILD_SUBREAPER)", ctypes.get_errno())
