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


class Length:
    """The size of one file in memory that outlives the process: 0 if nobody has noted it."""

    def __init__(self, lengths: memoryview, identity: str) -> None:
        """Use the row of the file with this identity, or else a free one, in the memory from `Env.lengths`."""
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).digest()
        known = [bytes(lengths[_ROW * row : _ROW * row + _DIGEST]) for row in range(_ROWS)]
        if digest in known:
            row = known.index(digest)
        elif bytes(_DIGEST) in known:
            row = known.index(bytes(_DIGEST))
        else:  # in place of any other: what is forgotten is only not compared
            row = digest[0] % _ROWS
        memory = lengths[_ROW * row : _ROW * (row + 1)]
        self._size = memory[_DIGEST:].cast("Q")
        if digest not in known:
            self._size[0] = 0  # first: a kill must not leave the size of another file
            memory[:_DIGEST] = digest

    @property
    def size(self) -> int:
        """Return how many bytes the file had at last."""
        return self._size[0]

    @size.setter
    def size(self, size: int) -> None:
        self._size[0] = size
