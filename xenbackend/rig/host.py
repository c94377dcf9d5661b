"""The simulated machine of a backend process: `kernel.ports` on the rig, named ``xenbackend.rig.host:DIRECTORY``.

Must not be more lenient than the real devices: anything that gntdev or evtchn refuses is refused here
(`tests/contract/test_ports.py` tests both with the same cases).
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from xenbackend.errors import KernelError
from xenbackend.kernel import memory
from xenbackend.kernel.fence import find_fence
from xenbackend.kernel.fixed import map_pages
from xenbackend.kernel.ports import GRANT_OK, Arena, CopySegment, Fence
from xenbackend.rig.hypervisor import BACKEND_DOMID
from xenbackend.rig.table import Table
from xenbackend.rig.wire import Connection
from xenbackend.units import PAGE


@dataclass(slots=True)
class RigMapping:
    """Granted pages, side by side."""

    view: memoryview
    address: int
    release: Callable[[], None]


class RigGrants:
    """One domain's grants, like an open `/dev/xen/gntdev`."""

    def __init__(self, connection: Connection, domid: int) -> None:
        """Open the domain through `connection`, which it owns. Raises: KernelError."""
        self._domid = domid
        self._connection = connection
        self._handles: set[int] = set()  # of mappings
        try:
            answer, (self._memory_fd, grants) = self._connection.call("open", domid=domid)
        except KernelError:
            self._connection.close()
            raise
        self._table = Table(grants, answer["pages"])
        self._memory = memoryview(mmap.mmap(self._memory_fd, answer["pages"] * PAGE))
        os.close(grants)

    def map(self, grefs: Sequence[int], *, writable: bool) -> RigMapping:
        """Map pages. Raises: KernelError."""
        answer, _ = self._connection.call("map", domid=self._domid, grefs=[*grefs], writable=writable)
        view, address, unmap = map_pages(self._memory_fd, answer["frames"], writable=writable)

        self._handles.add(answer["handle"])

        def release() -> None:
            unmap()
            self._forget(answer["handle"])

        return RigMapping(view, address, release)

    def copy(self, arena: Arena, segments: Sequence[CopySegment]) -> list[int]:
        """Copy between guest and arena; each grant is looked up again.

        Raises: KernelError if a segment crosses the guest's page; gntdev refuses the whole call as well.
        """
        if any(segment.page_offset + segment.length > PAGE for segment in segments):
            raise KernelError(f"copy {len(segments)} grants", errno.EINVAL)
        near, far, find = arena.view, self._memory, self._table.frame
        statuses = []
        for gref, offset, here, length, to_guest in segments:
            frame = find(gref, BACKEND_DOMID, writable=to_guest)
            if frame < 0:
                statuses.append(frame)
                continue
            statuses.append(GRANT_OK)
            there = frame * PAGE + offset
            if to_guest:
                far[there : there + length] = near[here : here + length]
            else:
                near[here : here + length] = far[there : there + length]
        return statuses

    def close(self) -> None:
        """Release the domain. The hypervisor forgets the mappings, but their views stay until the process ends."""
        for handle in list(self._handles):
            with suppress(KernelError):
                self._forget(handle)
        self._connection.close()
        self._memory.release()
        del self._table  # which unmaps the grants
        os.close(self._memory_fd)

    def _forget(self, handle: int) -> None:
        self._handles.discard(handle)
        self._connection.call("unmap", handle=handle)


class RigEvents:
    """Event channels towards one domain, like an open `/dev/xen/evtchn`.

    A port is an eventfd in an epoll set with EPOLLONESHOT: when it fires it is disarmed, and so masked until `unmask`.
    """

    def __init__(self, connection: Connection, domid: int) -> None:
        """Open the device through `connection`, which it owns."""
        self._domid = domid
        self._connection = connection
        self._epoll = select.epoll()
        self._incoming: dict[int, int] = {}  # local port to descriptor
        self._outgoing: dict[int, int] = {}
        self._ports: dict[int, int] = {}  # descriptor to local port

    def fileno(self) -> int:
        """Return a descriptor that is readable while a port is pending."""
        return self._epoll.fileno()

    def bind(self, remote_port: int) -> int:
        """Bind a port of the domain; it is pending at once. Raises: KernelError."""
        answer, (incoming, outgoing) = self._connection.call("bind", domid=self._domid, port=remote_port)
        port: int = answer["port"]
        self._incoming[port], self._outgoing[port], self._ports[incoming] = incoming, outgoing, port
        self._epoll.register(incoming, select.EPOLLIN | select.EPOLLONESHOT)
        return port

    def pending(self) -> list[int]:
        """Return the ports that fired; they stay masked."""
        ports = []
        for fd, _ in self._epoll.poll(0):
            os.eventfd_read(fd)
            ports.append(self._ports[fd])
        return ports

    def unmask(self, port: int) -> None:
        """Let the port fire again."""
        self._epoll.modify(self._incoming[port], select.EPOLLIN | select.EPOLLONESHOT)

    def notify(self, port: int) -> None:
        """Notify the guest; does nothing if it is gone."""
        os.eventfd_write(self._outgoing[port], 1)

    def unbind(self, port: int) -> None:
        """Close the port; the guest's end becomes unbound again. Raises: KernelError."""
        if port not in self._incoming:
            raise KernelError(f"closing port {port}", errno.ENOTCONN)
        self._connection.call("unbind", port=port)
        self._forget(port)

    def close(self) -> None:
        """Close every port."""
        for port in list(self._incoming):
            with suppress(KernelError):
                self._connection.call("unbind", port=port)
            self._forget(port)
        self._connection.close()
        self._epoll.close()

    def _forget(self, port: int) -> None:
        incoming = self._incoming.pop(port)
        self._epoll.unregister(incoming)
        del self._ports[incoming]
        os.close(incoming)
        os.close(self._outgoing.pop(port))


class RigHost:
    """The machine whose hypervisor serves in `directory`."""

    def __init__(self, directory: str, devices: Sequence[int] = ()) -> None:
        """Use `devices`, descriptors from `open_devices` that stay the caller's; if there are none, connect."""
        self._directory = directory
        self._devices = devices
        self.fence: Fence = find_fence()[0]

    def open_grants(self, domid: int) -> RigGrants:
        """Open a domain's grants. Raises: KernelError."""
        return RigGrants(self._connect(0), domid)

    def open_events(self, domid: int) -> RigEvents:
        """Open event channels towards a domain. Raises: KernelError."""
        return RigEvents(self._connect(1), domid)

    def allocate(self, size: int) -> Arena:
        """Return page-aligned memory."""
        return memory.allocate(size)

    def _connect(self, number: int) -> Connection:
        """Return a connection for device `number`. If it is a copy, the caller must release what it holds itself."""
        return (
            Connection(self._directory, os.dup(self._devices[number])) if self._devices else Connection(self._directory)
        )


def open_host(argument: str, devices: Sequence[int] = ()) -> RigHost:
    """Return the host of the rig in the directory `argument`."""
    return RigHost(argument, devices)


def open_devices(argument: str, domid: int) -> list[int]:  # noqa: ARG001 - the rig does not restrict devices
    """Return two connections to the rig in the directory `argument`. Raises: KernelError."""
    grants = Connection(argument)
    try:
        events = Connection(argument)
    except KernelError:
        grants.close()
        raise
    return [grants.detach(), events.detach()]
