"""The sizes of a disk's files, noted for whoever opens them after this process.

Must not open or measure a file.
"""

from __future__ import annotations

import hashlib

from xenbackend.units import PAGE

SIZE = PAGE  # bytes of the memory
_DIGEST = 32  # bytes, of a file's identity; its size follows
_ROW = _DIGEST + 8
_ROWS = SIZE // _ROW  # more than the files of two chains


class Lengths:
    """The sizes of a disk's files in memory that outlives the process, as one opening of its chain uses them."""

    def __init__(self, memory: memoryview) -> None:
        """Use `memory`, of SIZE bytes, which are zeros if nothing was noted yet."""
        self._memory = memory
        self._wanted: set[int] = set()  # rows

    def of(self, identity: str) -> Length:
        """Return what is noted of the file with this identity: a size of 0 if nobody has noted it."""
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).digest()
        known = [bytes(self._memory[_ROW * row : _ROW * row + _DIGEST]) for row in range(_ROWS)]
        if digest in known:
            row = known.index(digest)
        elif bytes(_DIGEST) in known:
            row = known.index(bytes(_DIGEST))
        else:  # in place of any other: what is forgotten is only not compared
            row = digest[0] % _ROWS
        self._wanted.add(row)
        memory = self._memory[_ROW * row : _ROW * (row + 1)]
        length = Length(memory[_DIGEST:].cast("Q"))
        if digest not in known:
            length.size = 0  # first: a kill must not leave the size of another file
            memory[:_DIGEST] = digest
        return length

    def clear(self) -> None:
        """Forget all sizes."""
        self._memory[:] = bytes(SIZE)

    def drop_unwanted(self) -> None:
        """Forget the files that this opening has not asked for: who may change them is not known from now on."""
        for row in {*range(_ROWS)} - self._wanted:
            self._memory[_ROW * row : _ROW * (row + 1)] = bytes(_ROW)


class Length:
    """The size of one file."""

    def __init__(self, size: memoryview) -> None:
        self._size = size  # one item, of 64 bits

    @property
    def size(self) -> int:
        """Return how many bytes the file had at last."""
        return self._size[0]

    @size.setter
    def size(self, size: int) -> None:
        self._size[0] = size
