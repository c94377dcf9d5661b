"""ram: a disk in the host's memory, empty or filled from a file.

Synopsis:
    ram:SIZE
    ram:FILE

Description:
    SIZE, such as `64M`, makes a disk of zeros. FILE, a name that begins with `/` or `.`, makes a disk with the file's
    content, which is read once and never written back.

Behaviour:
    The content is lost when the vbd is closed. It is not lost when the worker dies: its successor continues with the
    same memory, and does not read FILE again. A flush has nothing to do. A discard sets the range to zeros.

Example:
    ram:64M

Limits:
    The host needs the memory: pages are taken when they are first written, and then they stay taken.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Annotated

from xenbackend.block.driver import Env, Geometry, SimpleDriver
from xenbackend.block.options import Kind, option
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.units import PAGE, format_size, parse_size

_CHUNK = 1 << 20  # bytes read from a file at a time
_LOADED = 1


def _size_or_file(text: str) -> int | str:
    return text if text.startswith(("/", ".")) else parse_size(text)


class Ram(SimpleDriver):
    """A disk in memory that outlives the worker."""

    name = "ram"

    @dataclass(frozen=True, slots=True)
    class Options:
        """What the disk holds at first."""

        content: Annotated[int | str, Kind("size or file", _size_or_file)] = option(
            "bytes of an empty disk, or the file to fill it from", target=True
        )

    options: Options

    def open(self, env: Env) -> Geometry:
        """Get the memory, and fill it unless a predecessor has."""
        content = self.options.content
        if isinstance(content, str):
            size = self._load(env, content)
        else:
            size = content
            self._disk = self._memory(env, size)
        return Geometry(size=size, read_only=env.read_only, can_discard=True, discard_granularity=512)

    def read(self, request: Request) -> None:
        """Copy out of the memory."""
        place = request.offset
        for view in request.iov:
            end = place + len(view)
            view[:] = self._disk[place:end]
            place = end

    def write(self, request: Request) -> None:
        """Copy into the memory."""
        place = request.offset
        for view in request.iov:
            end = place + len(view)
            self._disk[place:end] = view
            place = end

    def discard(self, request: Request) -> None:
        """Set the range to zeros, a piece at a time."""
        end = request.offset + request.length
        for place in range(request.offset, end, _CHUNK):
            length = min(_CHUNK, end - place)
            self._disk[place : place + length] = bytes(length)

    def close(self) -> None:
        """Let go of the memory."""
        self._disk.release()

    def _load(self, env: Env, path: str) -> int:
        file = env.files.open(path, read_only=True, shareable=True, direct=False, blocking=True)
        try:
            self._disk = self._memory(env, file.size)
            state = env.memory("state", PAGE)
            if state[0] != _LOADED:
                for place in range(0, file.size, _CHUNK):
                    data = file.read_at(place, min(_CHUNK, file.size - place))
                    self._disk[place : place + len(data)] = data
                state[0] = _LOADED  # last: a worker that dies while it reads has not loaded
            return file.size
        finally:
            file.close()

    def _memory(self, env: Env, size: int) -> memoryview:
        if size <= 0:
            raise DriverError("a disk needs at least one sector", option="content")
        try:
            return env.memory("disk", size)
        except (OSError, OverflowError, MemoryError, ValueError) as error:
            problem = f"the host has no memory for a disk of {format_size(size)}"
            raise DriverError(problem, option="content", errno=errno.ENOMEM) from error
