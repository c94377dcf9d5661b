"""Discards of a disk of VHD blocks: holes in the file, without a change of the table.

Must not free a block: reusing its place for another block would have to be ordered against every write in flight, and
would save no more room than a hole does.
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

_AT_ONCE = 16384  # absent blocks that are skipped before other requests get their turn


class Holes:
    """Punches holes for the sectors that the image has: they become its zeros, and take no room on the host."""

    def __init__(self, disk: Blocks) -> None:
        self._disk = disk
        self._io = disk.io

    def make(self, request: Request) -> None:
        """Do a discard, and end the request."""
        disk, bits = self._disk, self._disk.cluster_bits
        if not disk.can_discard:
            disk.io.finish(request, errno.EOPNOTSUPP)
        elif request.offset >> bits == request.offset + request.length - 1 >> bits:
            self._make_in_block(request)
        else:
            self._go_on(request, request.offset, 0)

    def _go_on(self, request: Request, offset: int, status: int) -> None:
        """Go from block to block, with a pause for other requests after many blocks that are absent."""
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
        self._io.soon(partial(self._go_on, request, offset, status))  # otherwise the stack would grow with each block

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
