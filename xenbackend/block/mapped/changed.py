"""A file that is only read, seen with changes that are not in it: those of a log that nobody may write back.

Must not write to the file, nor know whose changes they are. What has no changes is read as before, and costs a look at
where the request lies.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from xenbackend.block.driver import Complete, File
from xenbackend.block.formats.common import Read
from xenbackend.block.request import Op, Request

Change = tuple[int, int, bytes | None]  # first byte in the file, length, what stands there; None: zeros


class Changes:
    """Ranges of a file that have other bytes than the file, none over another."""

    def __init__(self, newest_first: Iterable[Change] = ()) -> None:
        """Take changes; where two lie over one another, the one that comes first counts."""
        pieces: list[Change] = []
        starts: list[int] = []  # what has its bytes already; neighbours are joined, so that nothing is looked at twice
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
        self.end = max(self._ends, default=0)  # bytes: where the last one ends

    def __len__(self) -> int:
        """Return how many ranges there are."""
        return len(self._pieces)

    def put(self, offset: int, iov: Sequence[memoryview]) -> None:
        """Put the changes into what was read from `offset` on."""
        for view in iov:
            for start, length, data in self._between(offset, offset + len(view)):
                first, after = max(start, offset), min(start + length, offset + len(view))
                what = bytes(after - first) if data is None else data[first - start : after - start]
                view[first - offset : after - offset] = what
            offset += len(view)

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """Return where the first bytes at or behind `offset` begin and end that are not just zeros; None for none."""
        for number in range(bisect_right(self._ends, offset), len(self._pieces)):
            start, length, data = self._pieces[number]
            if data is not None:
                return max(offset, start), start + length
        return None

    def reader(self, read: Read, size: int) -> Read:
        """Return what reads by `read`, with the changes, from a file that has `size` bytes with them."""

        def changed(offset: int, length: int) -> bytes:
            length = max(0, min(length, size - offset))
            data = bytearray(read(offset, length).ljust(length, b"\0"))
            self.put(offset, [memoryview(data)])
            return bytes(data)

        return changed

    def _between(self, offset: int, end: int) -> Iterator[Change]:
        """Yield what reaches into a range."""
        for number in range(bisect_right(self._ends, offset), len(self._pieces)):
            if self._pieces[number][0] >= end:
                break
            yield self._pieces[number]


class ChangedFile:
    """A file with changes over it; implements `block.driver.File` for readers.

    Args:
        file: opened for reading only, and closed with this one.
        changes: what is to be seen in its place.
        size: bytes that the file has with them.
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
        """Where finished requests go."""
        return self._complete

    @complete.setter
    def complete(self, complete: Complete) -> None:
        self._complete = complete

    def submit(self, batch: list[Request]) -> None:
        """Take requests; what is past the end of the file itself is zeros there, too."""
        self._file.submit(batch)

    def read_at(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes, blocking. Raises: OSError."""
        return self._reader(offset, length)

    def write_at(self, offset: int, data: bytes) -> None:
        """Refuse it. Raises: OSError."""
        raise OSError(errno.EROFS, f"{len(data)} bytes to {offset} of a file that is only read")

    def grow(self, size: int, tail: bytes = b"") -> None:
        """Refuse it. Raises: OSError."""
        raise OSError(errno.EROFS, f"{size + len(tail)} bytes for a file that is only read")

    @property
    def allocated(self) -> int:
        """Return what the host keeps for the file, in bytes."""
        return self._file.allocated

    def next_data(self, offset: int) -> tuple[int, int]:
        """Return where the first data at or behind `offset` begin and end; the size twice where there are none."""
        size = self._file.size
        found = self._file.next_data(offset) if offset < size else (size, size)
        if found[0] >= size:
            found = self.size, self.size
        return min(found, self._changes.next_data(offset) or found)

    def sync(self) -> None:
        """Have nothing to make durable."""

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
