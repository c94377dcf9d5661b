"""Words of every format: how a file is read and written, and what is said of one that is damaged.

Must not know a format.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.errors import DriverError

Read = Callable[[int, int], bytes]  # (offset, length) to bytes, fewer at the end of the file
Write = tuple[int, bytes]  # offset in the image's file, which may grow, and what to write there
Plan = list[list[Write]]  # steps one after the other, the writes of one in any order


def damaged(problem: str, tool: str = "qemu-img check") -> DriverError:
    """Return the error for an image whose own bytes contradict one another; `tool` is what looks at all of it."""
    return DriverError(f"it is damaged: {problem}; look at it with {tool}")
