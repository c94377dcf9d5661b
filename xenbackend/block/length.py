"""The size of a file, noted for whoever opens the file after this process.

Must not open or measure the file.
"""

from __future__ import annotations

import hashlib

from xenbackend.block.env import Env
from xenbackend.units import PAGE

_DIGEST = 32  # bytes, of the file's identity; the size follows


class Length:
    """The size of one file in memory that outlives the process: 0 if the memory is new, or of another file."""

    def __init__(self, memory: memoryview, identity: str) -> None:
        """Use `memory`, of at least 40 bytes, for the file with this identity."""
        self._size = memory[_DIGEST : _DIGEST + 8].cast("Q")
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).digest()
        if memory[:_DIGEST] != digest:
            self._size[0] = 0  # first: a kill must not leave the size of another file
            memory[:_DIGEST] = digest

    @property
    def size(self) -> int:
        """Return how many bytes the file had at last."""
        return self._size[0]

    @size.setter
    def size(self, size: int) -> None:
        self._size[0] = size


def length_in_memory(env: Env, name: str) -> memoryview:
    """Return a layer's memory called `name` for a `Length`; nothing is noted there if no guest has written yet.

    Raises: OSError.
    """
    memory = env.memory(name, PAGE)
    if not env.resumes:
        memory[:] = bytes(PAGE)
    return memory
