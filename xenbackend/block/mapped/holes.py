"""Discards of a disk of VHD blocks: holes in the file, and no change of a table.

Must not free a block: an entry that was freed and used again for another block would have to be ordered against every
write in flight, and would save nothing that a hole does not.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from xenbackend.block.mapped.pieces import runs_of
from xenbackend.block.mapped.tables import SPECIAL
from xenbackend.block.request import Op, Request

if TYPE_CHECKING:
    from xenbackend.block.mapped.blocks import Blocks

_AT_ONCE = 16384  # blocks that are not there, looked at in one go


class Holes:
    """Makes holes where sectors are the image's own: they stay its own, as zeros, and take no room in the host."""

    def __init__(self, disk: Blocks) -> None:
        self._disk = disk
        self._io = disk.io

    def make(self, request: Request) -> None:
        """Do a discard, and end it."""
        disk, bits = self._disk, self._disk.cluster_bits
        if not disk.can_discard:
            disk.io.finish(request, errno.EOPNOTSUPP)
        elif request.offset >> bits == request.offset + request.length - 1 >> bits:
            self._make_in_block(request)
        else:
            self._go_on(request, request.offset, 0)

    def _go_on(self, request: Request, offset: int, status: int) -> None:
        """Go from block to block; between many that are not there, others have their turn."""
        disk, bits, end = self._disk, self._disk.cluster_bits, request.offset + request.length
        stop = min(end, offset + (_AT_ONCE << bits))
        while offset < stop and not disk.entries[offset >> bits]:
            offset = (offset >> bits) + 1 << bits
        if status or offset >= end:
            disk.io.finish(request, status)
        elif offset >= stop:
            disk.io.pause(partial(self._go_on, request, offset))
        else:
            stop = min(end, (offset >> bits) + 1 << bits)
            then = partial(self._soon_go_on, request, stop)
            self._make_in_block(disk.io.part(Op.DISCARD, offset, stop - offset, (), then))

    def _soon_go_on(self, request: Request, offset: int, status: int) -> None:
        self._io.soon(partial(self._go_on, request, offset, status))  # or each block went one call deeper

    def _make_in_block(self, request: Request) -> None:
        disk = self._disk
        block, first, last = disk.sectors(request)
        entry = disk.entries[block]
        present = disk.bitmap(block) if entry & SPECIAL else None
        if not entry:
            disk.io.finish(request, 0)
        elif not entry & SPECIAL:
            disk.io.to_file(request, disk.place(request))
        elif present is None:
            disk.load_bitmap(block, request)
        else:
            is_own = present[first]
            for part in disk.io.split(request, runs_of(present, first, last)):
                if is_own:
                    disk.io.to_file(part, disk.place(part))
                else:
                    disk.io.finish(part, 0)
                is_own = not is_own
