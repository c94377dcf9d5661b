"""What the workers of one vbd had kept, for the next one that opens the same chain.

Must not look into a memory, nor give one to another disk.
"""

from __future__ import annotations

import os

from xenbackend.control import MAX_MEMORIES


class Memories:
    """Descriptors by name; they are closed when the vbd ends, or when another chain is opened."""

    def __init__(self) -> None:
        self._chain = ""
        self._fds: dict[str, int] = {}

    def open_for(self, chain: str) -> dict[str, int]:
        """Return the descriptors for a worker that is to open `chain`; those of another chain are closed."""
        if chain != self._chain:
            self.close()
            self._chain = chain
        return dict(self._fds)

    def keep(self, name: str, fd: int) -> None:
        """Take over a descriptor, in the place of a former one of that name; one too many is closed."""
        former = self._fds.pop(name, None)
        if former is not None:
            os.close(former)
        if len(self._fds) < MAX_MEMORIES:
            self._fds[name] = fd
        else:
            os.close(fd)

    def close(self) -> None:
        """Let go of everything."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
