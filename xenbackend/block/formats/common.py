"""What all formats share: types for reading and writing a file, and the error for a damaged image.

Must not know a format.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.errors import DriverError

Read = Callable[[int, int], bytes]  # (offset, length) to bytes, fewer at the end of the file
Write = tuple[int, bytes]  # offset in the image's file, which may grow, and the bytes to write there
Plan = list[list[Write]]  # steps, one after the other; the writes of a step may be done in any order


def damaged(problem: str, tool: str = "qemu-img check") -> DriverError:
    """Return the error for an image whose content is inconsistent; `tool` is the one that checks all of it."""
    return DriverError(f"it is damaged: {problem}; look at it with {tool}")
