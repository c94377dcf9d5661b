"""Writes to an image's file in steps, each of which is durable before the next one begins.

Must not know a format.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from xenbackend.block.driver import File
from xenbackend.block.formats.common import Write
from xenbackend.errors import DriverError
from xenbackend.units import PAGE, format_size, round_up


def write_plan(file: File, plan: Sequence[Sequence[Write]]) -> None:
    """Carry out a plan; the file grows if necessary. Raises: OSError."""
    for writes in filter(None, plan):
        end = _end_of([writes])
        if end > file.size:
            file.grow(round_up(end, PAGE))
        for offset, data in writes:
            file.write_at(offset, data)
        file.sync()


def write_within(file: File, plan: Sequence[Sequence[Write]], *, on_device: bool) -> None:
    """Carry out a plan, all of which must fit if the file is a block device. Raises: DriverError, OSError."""
    if on_device and (end := _end_of(plan)) > file.size:
        raise no_room(end, file.size)
    write_plan(file, plan)


def no_room(needed: int, size: int) -> DriverError:
    """Return the error for a block device that is too small."""
    problem = f"the device has {format_size(size)}, but {format_size(needed)} are needed"
    return DriverError(f"{problem}; make the device larger first", errno=errno.ENOSPC)


def _end_of(plan: Sequence[Sequence[Write]]) -> int:
    return max((offset + len(data) for writes in plan for offset, data in writes), default=0)
