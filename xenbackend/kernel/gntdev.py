"""Grants through `/dev/xen/gntdev`: map pages of a domain, and copy to and from them.

Must not decide when to map or to copy, and must not trust a return value of 0: each segment has its own status.
Structures and numbers: linux/include/uapi/xen/gntdev.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from xenbackend.errors import KernelError
from xenbackend.kernel import ioctl, memory
from xenbackend.kernel.ports import Arena, CopySegment
from xenbackend.units import PAGE

PATH = "/dev/xen/gntdev"
MAP = struct.Struct("=IIQ")  # ioctl_gntdev_map_grant_ref: count, pad, index (out); then the refs
REF = struct.Struct("=II")  # ioctl_gntdev_grant_ref: domid, ref
UNMAP = struct.Struct("=QII")  # ioctl_gntdev_unmap_grant_ref: index, count, pad
COPY = struct.Struct("=I4xQ")  # ioctl_gntdev_grant_copy: count, address of the segments
FROM_GUEST = struct.Struct("=IHHQHHh2x")  # gntdev_grant_copy_segment: ref, offset, domid -> virt; len, flags, status
TO_GUEST = struct.Struct("=QIHHHHh2x")  # virt -> ref, offset, domid; len, flags, status
MAP_GRANT_REF = ioctl.number("G", 0, MAP.size + REF.size)  # of one ref, however many follow
UNMAP_GRANT_REF = ioctl.number("G", 1, UNMAP.size)
GRANT_COPY = ioctl.number("G", 8, COPY.size)
GNTCOPY_SOURCE_GREF = 1  # xen/grant_table.h
GNTCOPY_DEST_GREF = 2
STATUS_AT = 20  # offset of the status in a segment
_UNTOUCHED = -1  # GNTST_general_error: the status of a segment that the kernel has not processed yet


class GrantMapping:
    """Pages mapped side by side; implements `kernel.ports.Mapping`."""

    def __init__(self, fd: int, index: int, count: int, live: set[GrantMapping], *, writable: bool) -> None:
        self._fd = fd
        self._live = live
        self._index = index
        self._count = count
        self.address = memory.map_device(fd, count * PAGE, index, writable=writable, operation=f"map {count} grants")
        self.view = memory.view_at(self.address, count * PAGE, writable=writable)
        live.add(self)

    def release(self) -> None:
        """Unmap. No view of the mapping may be used any more. Raises: KernelError."""
        self._live.discard(self)
        self.view = memoryview(b"")
        try:
            memory.unmap(self.address, self._count * PAGE)
        finally:
            _forget(self._fd, self._index, self._count)


def open_device(path: str = PATH) -> int:
    """Return a descriptor of the grant device. Raises: KernelError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open {path}", error.errno or 0) from error


class Gntdev:
    """The grant device, for the grants of one domain; implements `kernel.ports.GrantTable`."""

    def __init__(self, domid: int, fd: int) -> None:
        """Use the device behind `fd`, and close it in the end. Other copies of `fd` may have mappings of their own."""
        self._fd = fd
        self._domid = domid
        self._live: set[GrantMapping] = set()
        self._segments = bytearray()
        self._statuses = memoryview(self._segments).cast("h")
        self._address = 0

    def map(self, grefs: Sequence[int], *, writable: bool) -> GrantMapping:
        """Map pages side by side, all or none. Raises: KernelError."""
        buffer = pack_map(self._domid, grefs)
        ioctl.call(self._fd, MAP_GRANT_REF, buffer, f"reserve the mapping of {len(grefs)} grants")
        (_, _, index) = MAP.unpack_from(buffer)
        try:
            return GrantMapping(self._fd, index, len(grefs), self._live, writable=writable)
        except KernelError:
            _forget(self._fd, index, len(grefs))
            raise

    def copy(self, arena: Arena, segments: Sequence[CopySegment]) -> list[int]:
        """Copy, and return one status per segment. Raises: KernelError if nothing was tried."""
        if len(segments) * FROM_GUEST.size > len(self._segments):
            self._grow(len(segments))
        pack_copy(self._segments, self._domid, arena.address, segments)
        ioctl.call(self._fd, GRANT_COPY, COPY.pack(len(segments), self._address), f"copy {len(segments)} grants")
        return self._statuses[STATUS_AT // 2 : len(segments) * FROM_GUEST.size // 2 : FROM_GUEST.size // 2].tolist()

    def close(self) -> None:
        """Release all mappings made by this object, and the descriptor, whichever of these steps fail.

        Raises: KernelError.
        """
        with ExitStack() as undo:
            undo.callback(os.close, self._fd)
            for mapping in self._live:
                undo.callback(mapping.release)

    def _grow(self, count: int) -> None:
        self._statuses.release()
        self._segments = bytearray(count * FROM_GUEST.size)
        whole = memoryview(self._segments)
        self._address = memory.address_of(whole)
        self._statuses = whole.cast("h")


def pack_map(domid: int, grefs: Sequence[int]) -> bytearray:
    """Return the argument of MAP_GRANT_REF."""
    refs = [word for gref in grefs for word in (domid, gref)]
    return bytearray(struct.pack(f"={MAP.size // 4}I{len(refs)}I", len(grefs), 0, 0, 0, *refs))


def pack_copy(buffer: bytearray, domid: int, near: int, segments: Sequence[CopySegment]) -> None:
    """Write `segments` into `buffer` as GRANT_COPY expects them; `near` is the address of the arena."""
    place = 0
    for each in segments:
        virt = near + each.arena_offset
        if each.to_guest:
            TO_GUEST.pack_into(
                buffer, place, virt, each.gref, each.page_offset, domid, each.length, GNTCOPY_DEST_GREF, _UNTOUCHED
            )
        else:
            FROM_GUEST.pack_into(
                buffer, place, each.gref, each.page_offset, domid, virt, each.length, GNTCOPY_SOURCE_GREF, _UNTOUCHED
            )
        place += FROM_GUEST.size


def _forget(fd: int, index: int, count: int) -> None:
    """Give the reservation back. If there is none any more, the kernel refuses, which does no harm."""
    with suppress(KernelError):
        ioctl.call(fd, UNMAP_GRANT_REF, UNMAP.pack(index, count, 0), "unmap grants")
