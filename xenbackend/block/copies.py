"""A layer's own memory, used for requests instead of the guest's, which may change at any moment (D7).

Must not know what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from xenbackend.block.mapped.parts import allocate

_LEAST = 4096
_MAX_USED = 32 << 20  # bytes in use at a time; a single request may exceed that
_MAX_SPARE = 8 << 20  # free bytes that are kept for later requests


class Copies:
    """The copies of one layer."""

    def __init__(self) -> None:
        self._spares: dict[int, list[memoryview]] = {}  # by size
        self._spared = self._used = 0  # bytes

    def have_room(self, length: int) -> bool:
        """Return whether another copy of `length` bytes may be made now; if not, wait until one is put back."""
        return not self._used or self._used + length <= _MAX_USED

    def take(self, length: int) -> memoryview:
        """Return memory of at least `length` bytes, aligned for direct I/O, with arbitrary content. Raises: OSError."""
        size = max(_LEAST, 1 << (length - 1).bit_length())
        spares = self._spares.get(size)
        if spares:
            memory = spares.pop()
            self._spared -= size
        else:
            memory = allocate(size)
        self._used += size
        return memory

    def put(self, memory: memoryview) -> None:
        """Take memory back."""
        size = len(memory)
        self._used -= size
        if self._spared + size > _MAX_SPARE:  # some are of sizes that are not used any more
            self._spares.clear()
            self._spared = 0
        if size <= _MAX_SPARE:
            self._spared += size
            self._spares.setdefault(size, []).append(memory)


def fill(memory: memoryview, place: int, iov: Sequence[memoryview]) -> None:
    """Copy a request's data into memory, from `place` on."""
    for view in iov:
        memory[place : place + len(view)] = view
        place += len(view)


def give(iov: Sequence[memoryview], memory: memoryview, place: int) -> None:
    """Copy memory, from `place` on, into a request's views."""
    for view in iov:
        view[:] = memory[place : place + len(view)]
        place += len(view)
