"""ram: a disk in the host's memory, empty or filled from a file.

Synopsis:
    ram:SIZE
    ram:FILE

Description:
    SIZE, such as `64M`, makes a disk of zeros. FILE, a name that begins with `/` or `.`, makes a disk with the content
    of that file, which is read once and never written back.

Behaviour:
    The content is lost when the vbd is closed. It survives the death of the worker: the successor continues with the
    same memory, and does not read FILE again. A flush does nothing. A discard sets the range to zeros, and returns the
    whole pages in it to the host.

    The content is also lost when the service ends or the chain is changed, and a guest that is still running would find
    a fresh disk in the place of its own. So a writable disk that was attached before is not opened with fresh content:
    detach it, and attach it again.

Example:
    ram:64M

Limits:
    The host needs the memory: a page is allocated when it is first written, and freed only when it is discarded.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Annotated

from xenbackend.block.driver import Env, File, Geometry, SimpleDriver
from xenbackend.block.options import IMAGE, Kind, option
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.units import PAGE, format_size, parse_size, round_up

_CHUNK = 1 << 20  # bytes read from a file at a time
_FILLED = 1  # in the first byte of the memory, a page before the disk; so neither is kept without the other
_HOST_PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes: the unit in which the host frees memory
_MADV_REMOVE = 9  # linux/mman.h; makes a hole in shared memory, which reads as zeros


def _size_or_file(text: str) -> int | str:
    return text if text.startswith(("/", ".")) else parse_size(text)


class Ram(SimpleDriver):
    """A disk in memory that outlives the worker."""

    name = "ram"

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `ram:`."""

        content: Annotated[int | str, Kind("size or file", _size_or_file, use=IMAGE)] = option(
            "bytes of an empty disk, or the file to fill it from", target=True
        )

    options: Options

    def open(self, env: Env) -> Geometry:
        """Get the memory, and fill it unless a predecessor has done so."""
        content = self.options.content
        size = self._load(env, content) if isinstance(content, str) else self._fill(env, content)
        can_discard = hasattr(self._memory.obj, "madvise")
        granularity = 512 if can_discard else 0
        return Geometry(size=size, read_only=env.read_only, can_discard=can_discard, discard_granularity=granularity)

    def read(self, request: Request) -> None:
        """Copy from the disk's memory."""
        place = request.offset
        for view in request.iov:
            end = place + len(view)
            view[:] = self._disk[place:end]
            place = end

    def write(self, request: Request) -> None:
        """Copy into the disk's memory."""
        place = request.offset
        for view in request.iov:
            end = place + len(view)
            self._disk[place:end] = view
            place = end

    def discard(self, request: Request) -> None:
        """Free the whole pages in the range, and set the rest of it to zeros."""
        start = PAGE + request.offset
        end = start + request.length
        first, last = round_up(start, _HOST_PAGE), end - end % _HOST_PAGE
        if first >= last:
            self._memory[start:end] = bytes(request.length)
            return
        self._memory[start:first] = bytes(first - start)
        self._memory[last:end] = bytes(end - last)
        self._memory.obj.madvise(_MADV_REMOVE, first, last - first)  # type: ignore[attr-defined]  # see `open`

    def close(self) -> None:
        """Release the memory."""
        self._disk.release()
        self._memory.release()

    def _load(self, env: Env, path: str) -> int:
        file = env.files.open(path, read_only=True, direct=False, blocking=True)
        try:
            return self._fill(env, file.size, file)
        finally:
            file.close()

    def _fill(self, env: Env, size: int, file: File | None = None) -> int:
        """Get the memory, and unless a predecessor has filled it, fill it from `file`; return `size`."""
        self._memory = _memory(env, size)
        self._disk = self._memory[PAGE:]
        if self._memory[0] != _FILLED:
            if env.resumes and not env.read_only:
                problem = "what the guest had written to this disk was lost with the service's memory; "
                raise DriverError(
                    problem + "detach the disk and attach it again", option="content", errno=errno.ENODATA
                )
            for place in range(0, size if file else 0, _CHUNK):
                data = file.read_at(place, min(_CHUNK, size - place))  # type: ignore[union-attr]  # only where one is
                self._disk[place : place + len(data)] = data
            self._memory[0] = _FILLED  # last, so that a worker that dies while it reads FILE leaves no filled memory
        return size


def _memory(env: Env, size: int) -> memoryview:
    if size <= 0:
        raise DriverError("a disk needs at least one sector", option="content")
    try:
        return env.memory("disk", PAGE + size)
    except (OSError, OverflowError, MemoryError, ValueError) as error:
        problem = f"the host has not enough memory for a disk of {format_size(size)}"
        raise DriverError(problem, option="content", errno=errno.ENOMEM) from error
