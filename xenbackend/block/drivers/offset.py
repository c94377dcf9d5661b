"""offset: shows a range of the layer below as a disk.

Synopsis:
    offset:[start=SIZE][,length=SIZE]

Description:
    The disk begins `start` bytes into the layer below and is `length` bytes long, or reaches to the end of what is
    below. It is what `losetup --offset --sizelimit` and nbdkit's offset filter do: for a file system behind a header,
    or for a disk in a part of a large device. For a partition there is `partition:`, which finds start and length
    itself.

Behaviour:
    Requests, their errors, flushes and discards go to the layer below, moved by `start`; nothing outside of the range
    is read or written. The alignment of discards is told to the guest as it is seen from the range's beginning.

    A `start` or an end inside a sector, or behind the end of the layer below, is refused. Where the range begins
    inside a physical sector of the medium, most writes cover parts of two of those, and are slow; `xenbackend check`
    says so as `alignment`.

    With `length`, `xenbackend resize` changes nothing. Without it the disk grows with the layer below.

Example:
    offset:start=1M|aio:/srv/images/disk.raw
    log:|offset:start=8G,length=4G|aio:/dev/vg/all

Limits:
    It costs 0.6 us a request in batches, for a request of its own for each of the guest's. Two disks on ranges of one
    image are refused, since one of them has it locked, unless `share=on` says that the ranges do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.block.driver import Env, Geometry
from xenbackend.block.options import Size, option
from xenbackend.block.window import Window


class Offset(Window):
    """See the head of this file."""

    name = "offset"

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `offset:`."""

        start: Size = option("where the disk begins in the layer below", default=0)
        length: Size = option("how long it is; 0: up to the end of the layer below", default=0)

    options: Options

    def open(self, env: Env) -> Geometry:
        """Find the range. Raises: DriverError."""
        below = super().open(env)
        start = self.options.start
        return self.show(start, self.options.length or below.size - start)
