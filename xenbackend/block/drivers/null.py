"""null: a disk of zeros that forgets what is written to it.

Synopsis:
    null:[SIZE]

Description:
    Needs no memory and no file. Use it to measure the cost of everything above it, and wherever the data do not matter.

Behaviour:
    Reads return zeros, whatever was written before. Writes, flushes and discards succeed and do nothing.

Example:
    delay:read=5ms|null:1T

Limits:
    A guest that reads back what it wrote gets zeros, so no file system works on this disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.block.driver import Driver, Env, Geometry
from xenbackend.block.options import Size, option
from xenbackend.block.request import Op, Request

_READ = int(Op.READ)
_ZEROS = {length: bytes(length) for length in (4096, 8192, 65536, 1 << 20)}  # the lengths of most views


class Null(Driver):
    """A disk of zeros."""

    name = "null"

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `null:`."""

        size: Size = option("bytes of the disk", default=1 << 30, target=True)

    options: Options

    def open(self, env: Env) -> Geometry:
        """Return a geometry of the size that was asked for."""
        size = self.options.size
        return Geometry(size=size, read_only=env.read_only, can_discard=True, discard_granularity=512)

    def submit(self, batch: list[Request]) -> None:
        """Fill the memory of reads with zeros, and give everything back."""
        zeros = _ZEROS
        for request in batch:
            if request.op == _READ:
                for view in request.iov:
                    length = len(view)
                    view[:] = zeros.get(length) or bytes(length)
            request.status = 0
        self.complete(batch)
