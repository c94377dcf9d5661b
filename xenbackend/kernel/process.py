"""What a process is to those below it.

Must not start or end one.
"""

from __future__ import annotations

import ctypes

from xenbackend.errors import KernelError

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends. Raises: KernelError."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0:
        raise KernelError("adopt processes (PR_SET_CHILD_SUBREAPER)", ctypes.get_errno())
