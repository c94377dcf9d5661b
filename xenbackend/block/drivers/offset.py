"""offset: shows a range of the layer below as a disk.

Synopsis:
    offset:[start=SIZE][,length=SIZE]

Description:
    The disk begins at byte `start` of the layer below, and is `length` bytes long or reaches to the end of that layer.
    `losetup --offset --sizelimit` and nbdkit's offset filter do the same. Use it for a file system behind a header,
    or for a disk in a part of a large device. For a partition use `partition:`, which finds start and length itself.

Behaviour:
    Requests go to the layer below, moved by `start`; nothing outside the range is read or written. Errors pass
    unchanged. The guest is told the alignment of discards as seen from the beginning of the range.

    A `start` or an end that is inside a sector, or beyond the end of the layer below, is refused. If the range begins
    inside a physical sector of the medium, most writes cover parts of two physical sectors, and are slow; `xenbackend
    check` reports that as `alignment`.

    With `length`, `xenbackend resize` changes nothing. Without it the disk grows with the layer below.

Example:
    offset:start=1M|aio:/srv/images/disk.raw
    log:|offset:start=8G,length=4G|aio:/dev/vg/all

Limits:
    It costs 0.6 us a request in batches, since it makes a request of its own for each of the guest's. The second of two
    disks on ranges of one image is refused, since the first one has the image locked; if the ranges do not overlap,
    allow it by `share=on` in the image's layer of both chains.
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
        length: Size = option("length of the disk; 0: up to the end of the layer below", default=0)

    options: Options

    def open(self, env: Env) -> Geometry:
        """Show the range that the options describe. Raises: DriverError."""
        below = super().open(env)
        start = self.options.start
        return self.show(start, self.options.length or below.size - start)
