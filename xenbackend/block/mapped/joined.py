"""Ranges of files as one read-only file: for a disk that is in several files, or a file in an archive.

Must not look at their content. A place in the joined file is the base of a range plus the place in that range. No two
ranges touch, so a request is always for one file.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass

from xenbackend.block.driver import Complete, File
from xenbackend.block.mapped.parts import cut
from xenbackend.block.request import Op, Request, clear
from xenbackend.units import round_up

_GAP = 1 << 20  # bytes between two ranges: more than a cluster can reach beyond the end of the first one


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a file, in bytes; beyond its end there are zeros."""

    file: File
    start: int
    length: int
    base: int  # in the joined file


class Joined:
    """A `block.driver.File`. It owns the files, from `add` on.

    A request is modified on its way down: moved to its place in the file, and cut off at the end of the range. So it
    has to be the sender's own, as those of a `MappedDisk` are, and not a guest's.
    """

    def __init__(self) -> None:
        self.size = 0
        self.sector_size = self.physical_sector_size = 512
        self.can_discard = False
        self.discard_granularity = 0
        self.mode = ""  # of the first file; the others are read in the same way
        self._spans: list[Span] = []
        self._bases: list[int] = []
        self._files: list[File] = []
        self._complete: Complete | None = None

    def add(self, file: File, start: int, length: int) -> int:
        """Add a range of a file, and return its base; several ranges may be of the same file."""
        if not any(each is file for each in self._files):
            self._files.append(file)
            self.mode = self.mode or file.mode
            self.physical_sector_size = max(self.physical_sector_size, file.physical_sector_size)
        base = round_up(self.size + _GAP, _GAP) if self._spans else 0
        self._spans.append(Span(file, start, length, base))
        self._bases.append(base)
        self.size = base + length
        return base

    @property
    def complete(self) -> Complete:
        """The function that finished requests are given to."""
        assert self._complete is not None  # noqa: S101 - the owner sets it before the first submit
        return self._complete

    @complete.setter
    def complete(self, complete: Complete) -> None:
        self._complete = complete
        for file in self._files:
            file.complete = complete

    def submit(self, batch: list[Request]) -> None:
        """Take requests."""
        to_files: dict[int, list[Request]] = defaultdict(list)
        behind = []
        for request in batch:
            number = self._number_at(request.offset)
            if request.op == Op.FLUSH or self._move(request, self._spans[number]):
                to_files[number].append(request)
            else:
                behind.append(request)
        for number, requests in to_files.items():
            self._spans[number].file.submit(requests)
        if behind:
            self.complete(behind)

    def read_at(self, offset: int, length: int) -> bytes:
        """See `File`."""
        span = self._spans[self._number_at(offset)]
        place = offset - span.base
        return span.file.read_at(span.start + place, max(0, min(length, span.length - place)))

    @property
    def allocated(self) -> int:
        """The bytes that the host has allocated for all the files."""
        return sum(each.allocated for each in self._files)

    def next_data(self, offset: int) -> tuple[int, int]:
        """See `File`. The answer is about the range that `offset` is in. Raises: OSError."""
        span = self._spans[self._number_at(offset)]
        moved, end = span.base - span.start, span.base + span.length
        first, after = span.file.next_data(offset - moved)
        return min(first + moved, end), min(after + moved, end)

    def place_in_file(self, place: int) -> int:
        """Return the place in its own file of a place in the joined one."""
        span = self._spans[self._number_at(place)]
        return place - span.base + span.start

    def write_at(self, offset: int, data: bytes) -> None:
        """Refuse to write. Raises: OSError."""
        raise OSError(errno.EROFS, f"{len(data)} bytes at {offset} of files that are only read")

    def grow(self, size: int, tail: bytes = b"") -> None:
        """Refuse to grow a file. Raises: OSError."""
        raise OSError(errno.EROFS, f"{size} bytes and {len(tail)} of files that are only read")

    def sync(self) -> None:
        """Do nothing: nothing was written."""

    def close(self) -> None:
        """Close every file. Raises: OSError if the last one could not be closed."""
        *others, last = self._files
        for file in others:
            with suppress(OSError):  # they were only read
                file.close()
        last.close()

    def _number_at(self, offset: int) -> int:
        return max(0, bisect_right(self._bases, offset) - 1)

    def _move(self, request: Request, span: Span) -> bool:
        """Move a request to its place in the file; if it begins beyond the range, fill it with zeros, return False."""
        place = request.offset - span.base
        inside = min(request.length, span.length - place)
        if inside < request.length:
            views = request.iov
            if inside <= 0:
                clear(views)
                request.status = 0
                return False
            first, rest = cut(views, [inside, request.length - inside])
            clear(rest)
            request.iov, request.length = first, inside
        request.offset = span.start + place
        return True
