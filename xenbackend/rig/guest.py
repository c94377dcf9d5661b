"""A guest's side of the simulated Xen: its pages, grants and event channels.

Must not know a protocol: `rig/frontend.py` does.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Callable
from pathlib import Path

from xenbackend.errors import KernelError
from xenbackend.kernel.fixed import map_pages
from xenbackend.rig.hypervisor import BACKEND_DOMID
from xenbackend.rig.table import ENTRIES, RESERVED, Table
from xenbackend.rig.wire import Connection
from xenbackend.units import PAGE


class GrantInUse(KernelError):
    """A grant cannot be revoked while a backend has the page mapped; a real guest would leak the page and log that."""

    def __init__(self, gref: int) -> None:
        super().__init__(f"taking back grant {gref}, which is still mapped", errno.EBUSY)


class GuestPort:
    """The guest's end of one event channel; the guest tells `number` to the backend."""

    def __init__(self, connection: Connection, remote_domid: int) -> None:
        answer, (self._incoming, self._outgoing) = connection.call("allocate_port", remote_domid=remote_domid)
        self.number: int = answer["port"]
        self._connection = connection

    def fileno(self) -> int:
        """Return a descriptor that is readable while the backend has notified us."""
        return self._incoming

    def outgoing(self) -> int:
        """Return the eventfd that notifies the backend, for code in C."""
        return self._outgoing

    def notify(self) -> None:
        """Notify the backend; does nothing if none is bound."""
        os.eventfd_write(self._outgoing, 1)

    def clear(self) -> bool:
        """Clear pending notifications. Return whether there were any."""
        try:
            return os.eventfd_read(self._incoming) > 0
        except BlockingIOError:
            return False

    def wait(self, timeout_s: float) -> bool:
        """Wait for a notification and clear it. Return False if none came in time."""
        poll = select.poll()
        poll.register(self._incoming, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000)) and self.clear()

    def close(self) -> None:
        """Close the port. Raises: KernelError."""
        self._connection.call("close_port", port=self.number)
        self.forget()

    def forget(self) -> None:
        """Release our descriptors, unless that was done before, without telling the hypervisor."""
        if self._incoming >= 0:
            os.close(self._incoming)
            os.close(self._outgoing)
        self._incoming = self._outgoing = -1  # later uses of the port must not reach another file's descriptor


class Guest:
    """A domain with `pages` pages of memory; it dies with `close` or with this process.

    Invariants: a frame is allocated at most once, and a gref stands for at most one frame.
    """

    def __init__(
        self, directory: str | Path, domid: int, pages: int = 4096, connection: Connection | None = None
    ) -> None:
        """Create the domain in the rig of `directory`, or through `connection`, which it owns. Raises: KernelError."""
        self.domid = domid
        self._connection = connection or Connection(directory)
        try:
            _, (memory, grants) = self._connection.call("create", domid=domid, pages=pages)
        except KernelError:
            self._connection.close()
            raise
        self.memory = memoryview(mmap.mmap(memory, pages * PAGE))
        self.table = Table(grants, pages)
        self._memory_fd = memory
        os.close(grants)
        self._free_frames = list(range(pages - 1, -1, -1))  # popped from the end: low frames first, adjacent ones
        self._free_grefs = list(range(ENTRIES - 1, RESERVED - 1, -1))
        self._ports: list[GuestPort] = []

    def allocate(self, count: int) -> list[int]:
        """Return `count` free frames; they are adjacent as long as no frame was ever freed. Raises: KernelError."""
        if count > len(self._free_frames):
            raise KernelError(f"allocating {count} pages in domain {self.domid}", errno.ENOMEM)
        return [self._free_frames.pop() for _ in range(count)]

    def free_pages(self) -> int:
        """Return how many pages are free."""
        return len(self._free_frames)

    def free(self, frames: list[int]) -> None:
        """Free frames."""
        self._free_frames.extend(reversed(frames))

    def page(self, frame: int, count: int = 1) -> memoryview:
        """Return the bytes of `count` pages from `frame` on."""
        return self.memory[frame * PAGE : (frame + count) * PAGE]

    def side_by_side(self, frames: list[int]) -> tuple[memoryview, Callable[[], None]]:
        """Return a view in which the frames are contiguous, as a driver's ring needs it, and a function to unmap it."""
        view, _, release = map_pages(self._memory_fd, frames, writable=True)
        return view, release

    def grant(self, frame: int, *, read_only: bool = False, domid: int = BACKEND_DOMID) -> int:
        """Grant a page and return its gref. Raises: KernelError if the table is full."""
        if not self._free_grefs:
            raise KernelError(f"granting a page of domain {self.domid}", errno.ENOSPC)
        gref = self._free_grefs.pop()
        self.table.set(gref, domid, frame, read_only=read_only)
        return gref

    def revoke(self, gref: int) -> None:
        """Revoke a grant. Raises: GrantInUse while a backend has the page mapped."""
        if self.table.in_use(gref):
            raise GrantInUse(gref)
        self.table.clear(gref)
        self._free_grefs.append(gref)

    def fail(self, gref: int, status: int) -> None:
        """Make every map and copy of `gref` fail with `status` (negative) from now on; 0 ends this."""
        self.table.faults[gref] = status

    def allocate_port(self, remote_domid: int = BACKEND_DOMID) -> GuestPort:
        """Return a new port that `remote_domid` may bind. Raises: KernelError."""
        self._ports.append(port := GuestPort(self._connection, remote_domid))
        return port

    def close(self) -> None:
        """End the domain and its ports."""
        self._connection.close()
        for port in self._ports:
            port.forget()
        os.close(self._memory_fd)
