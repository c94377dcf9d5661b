"""A read-only view of a file with changes applied in memory: those of a log that must not be written back.

Must not write to the file, nor know where the changes come from. A range without changes is read from the file, at the
cost of one search among the changes.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from xenbackend.block.driver import Complete, File
from xenbackend.block.formats.common import Read
from xenbackend.block.request import Op, Request

Change = tuple[int, int, bytes | None]  # first byte in the file, length, new content; None: zeros


class Changes:
    """Ranges of a file whose content is changed; they do not overlap."""

    def __init__(self, newest_first: Iterable[Change] = ()) -> None:
        """Take changes; where two of them overlap, the earlier in `newest_first` wins."""
        pieces: list[Change] = []
        starts: list[int] = []  # of ranges that are taken already; adjacent ones are joined
        ends: list[int] = []
        for change in newest_first:
            start, end = change[0], change[0] + change[1]
            first, after = bisect_left(ends, start), bisect_right(starts, end)
            free = [start, *ends[first:after]], [*starts[first:after], end]
            pieces += [_cut(change, place, stop) for place, stop in zip(*free, strict=True) if place < stop]
            joined = slice(first, after)
            starts[joined], ends[joined] = [min(start, *starts[joined], start)], [max(end, *ends[joined], end)]
        self._pieces = sorted(pieces, key=lambda piece: piece[0])
        self._ends = [start + length for start, length, _ in self._pieces]
        self.end = max(self._ends, default=0)  # bytes: the end of the last range

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._pieces)

    def put(self, offset: int, iov: Sequence[memoryview]) -> None:
        """Apply the changes to data that were read from `offset` on."""
        for view in iov:
            for start, length, data in self._between(offset, offset + len(view)):
                first, after = max(start, offset), min(start + length, offset + len(view))
                what = bytes(after - first) if data is None else data[first - start : after - start]
                view[first - offset : after - offset] = what
            offset += len(view)

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """Return where the first changed range at or after `offset` that is not of zeros begins and ends, or None."""
        for number in range(bisect_right(self._ends, offset), len(self._pieces)):
            start, length, data = self._pieces[number]
            if data is not None:
                return max(offset, start), start + length
        return None

    def reader(self, read: Read, size: int) -> Read:
        """Return a function that reads by `read` and applies the changes; `size` is the file's size with them."""

        def changed(offset: int, length: int) -> bytes:
            length = max(0, min(length, size - offset))
            data = bytearray(read(offset, length).ljust(length, b"\0"))
            self.put(offset, [memoryview(data)])
            return bytes(data)

        return changed

    def _between(self, offset: int, end: int) -> Iterator[Change]:
        """Yield the changes that overlap a range."""
        for number in range(bisect_right(self._ends, offset), len(self._pieces)):
            if self._pieces[number][0] >= end:
                break
            yield self._pieces[number]


class ChangedFile:
    """A file with changes applied; implements `block.driver.File` for readers.

    Args:
        file: opened for reading only, and closed with this one.
        changes: applied to everything that is read.
        size: the file's size in bytes, with the changes.
    """

    can_discard = False
    discard_granularity = 0

    def __init__(self, file: File, changes: Changes, size: int) -> None:
        self.size = size
        self.sector_size = file.sector_size
        self.physical_sector_size = file.physical_sector_size
        self.mode = file.mode
        self._file = file
        self._changes = changes
        self._reader = changes.reader(file.read_at, size)
        self._complete: Complete
        file.complete = self._done

    @property
    def complete(self) -> Complete:
        """The function that finished requests are given to."""
        return self._complete

    @complete.setter
    def complete(self, complete: Complete) -> None:
        self._complete = complete

    def submit(self, batch: list[Request]) -> None:
        """Take requests; what is beyond the end of the file, and not changed, is zeros."""
        self._file.submit(batch)

    def read_at(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes, blocking. Raises: OSError."""
        return self._reader(offset, length)

    def write_at(self, offset: int, data: bytes) -> None:
        """Refuse to write. Raises: OSError."""
        raise OSError(errno.EROFS, f"{len(data)} bytes to {offset} of a file that is only read")

    def grow(self, size: int, tail: bytes = b"") -> None:
        """Refuse to grow the file. Raises: OSError."""
        raise OSError(errno.EROFS, f"{size + len(tail)} bytes for a file that is only read")

    @property
    def allocated(self) -> int:
        """Return the bytes that the host has allocated for the file."""
        return self._file.allocated

    def next_data(self, offset: int) -> tuple[int, int]:
        """Return where the first data at or after `offset` begin and end; the size twice if there are none."""
        size = self._file.size
        found = self._file.next_data(offset) if offset < size else (size, size)
        if found[0] >= size:
            found = self.size, self.size
        return min(found, self._changes.next_data(offset) or found)

    def sync(self) -> None:
        """Do nothing: nothing was written."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _done(self, batch: list[Request]) -> None:
        for request in batch:
            if request.op == Op.READ and not request.status:
                self._changes.put(request.offset, request.iov)
        self._complete(batch)


def _cut(change: Change, first: int, after: int) -> Change:
    start, _, data = change
    return first, after - first, None if data is None else data[first - start : after - start]
