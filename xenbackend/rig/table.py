"""A domain's grant table in shared memory, as guest, hypervisor and backend see it.

Must not make a call. The guest writes an entry with one store and no hypercall, as a real guest does (grant table v1,
public/grant_table.h, `struct grant_entry_v1`: flags u16, domid u16, frame u32). The hypervisor adds the flags that mark
a page as in use. The entries are followed by one status per gref, for faults that a test injects.

Xen returns GNTST_general_error in some of these cases, so callers may only rely on the status not being 0.
"""

from __future__ import annotations

import mmap

GTF_PERMIT_ACCESS = 1
GTF_READONLY = 4
GTF_READING = 8  # mapped by somebody
GTF_WRITING = 16  # mapped for writing by somebody

GNTST_BAD_GNTREF = -3
GNTST_PERMISSION_DENIED = -8
GNTST_BAD_PAGE = -9

ENTRIES = 16384
RESERVED = 8  # the first grefs, which Linux keeps for the console and xenstore (NR_RESERVED_ENTRIES)
SIZE = ENTRIES * 8 + ENTRIES * 2  # bytes: entries, then faults

_TYPE_MASK = 3
_DOMID = 16  # first bit of the domid in an entry
_FRAME = 32


class Table:
    """The grant table of a domain with `pages` pages of memory; `fd` is the table's own shared memory."""

    def __init__(self, fd: int, pages: int) -> None:
        self.pages = pages
        view = memoryview(mmap.mmap(fd, SIZE))
        self.entries = view[: ENTRIES * 8].cast("Q")  # one aligned 64-bit access, so nobody sees half an entry
        self.flags = view[: ENTRIES * 8].cast("H")
        self.faults = view[ENTRIES * 8 :].cast("h")

    def set(self, gref: int, domid: int, frame: int, *, read_only: bool) -> None:
        """Grant `frame` to `domid`."""
        flags = GTF_PERMIT_ACCESS | (GTF_READONLY if read_only else 0)
        self.entries[gref] = flags | domid << _DOMID | frame << _FRAME

    def clear(self, gref: int) -> None:
        """Revoke the grant."""
        self.entries[gref] = 0

    def in_use(self, gref: int) -> bool:
        """Return whether the page is mapped."""
        return bool(self.flags[gref * 4] & (GTF_READING | GTF_WRITING))

    def mark(self, gref: int, used: int) -> None:
        """Mark how the page is mapped: `used` is a combination of GTF_READING and GTF_WRITING, or 0."""
        self.flags[gref * 4] = self.flags[gref * 4] & ~(GTF_READING | GTF_WRITING) | used

    def frame(self, gref: int, domid: int, *, writable: bool) -> int:
        """Return the frame that `gref` grants to `domid`, or a negative status if it grants none."""
        if not 0 <= gref < ENTRIES:
            return GNTST_BAD_GNTREF
        if self.faults[gref]:
            return self.faults[gref]
        entry = self.entries[gref]
        if entry & _TYPE_MASK != GTF_PERMIT_ACCESS:
            return GNTST_BAD_GNTREF
        if entry >> _DOMID & 0xFFFF != domid or (writable and entry & GTF_READONLY):
            return GNTST_PERMISSION_DENIED
        frame = entry >> _FRAME
        return frame if frame < self.pages else GNTST_BAD_PAGE
