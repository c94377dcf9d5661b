"""Opens files in this process, for whoever may open them himself: image commands, `check`, tests.

Must not be used by a worker.

It has the methods of `worker.opener.RemoteOpener`, and follows what an image names by the same rule.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from xenbackend.block.mapped.parents import find_named
from xenbackend.opener import steps
from xenbackend.protocol.opening import Facts


class LocalOpener:
    """Opens any file by its name; nothing is kept."""

    def open(self, path: str, *, write: bool) -> tuple[int, Facts]:
        """Return a descriptor of an open file description of its own. Raises: DriverError, OSError."""
        return self._reopen(steps.hold(path), path, write=write)

    def open_record(self, path: str) -> int:
        """Return a descriptor of a record file, which is made where it is not there. Raises: DriverError, OSError."""
        return self._reopen(steps.hold_record(path, create=True), path, write=True)[0]

    def look(self, path: str) -> Facts:
        """Return what a file is. Raises: DriverError, OSError."""
        fd = steps.hold(path)
        try:
            return steps.look(fd, path)
        finally:
            os.close(fd)

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> str:
        """Return the first file that is there of those that an image names. Raises: DriverError."""
        return find_named(what, image, names, within)

    def resolve(self, path: str) -> str:
        """Return the directory of a file with all links followed."""
        return steps.resolve(path)

    def _reopen(self, held: int, path: str, *, write: bool) -> tuple[int, Facts]:
        try:
            return steps.reopen(held, path, write=write), steps.look(held, path)
        finally:
            os.close(held)


def is_device(path: str) -> bool:
    """Return whether a file is a block device. Raises: DriverError, OSError."""
    return LocalOpener().look(path).is_device


def identity_of(path: str) -> str | None:
    """Return what tells a file from any other, None where none is there. Raises: DriverError, OSError."""
    try:
        return LocalOpener().look(path).identity
    except FileNotFoundError:
        return None
