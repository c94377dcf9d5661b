"""The rules of the simulated Xen: domains with memory, mapped grants, event channels; no socket.

Must not wait for anything. A user of the hypervisor is a `Holder`: everything that it holds is released when it leaves,
as a kernel does when a process dies. Event channels follow Xen's common/event_channel.c: when the backend's end closes,
the guest's port becomes unbound, and the same domain may bind it again; a port is pending as soon as it is bound.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from xenbackend.errors import KernelError
from xenbackend.rig.table import GTF_READING, GTF_WRITING, SIZE, Table
from xenbackend.units import PAGE

BACKEND_DOMID = 0  # the domain that maps, copies and binds
_EVENTFD = os.EFD_NONBLOCK | os.EFD_CLOEXEC


@dataclass(slots=True)
class Port:
    """The guest's end of an event channel: an eventfd per direction; both outlive the backend's end."""

    number: int
    remote_domid: int
    to_guest: int = field(default_factory=lambda: os.eventfd(0, _EVENTFD))
    to_backend: int = field(default_factory=lambda: os.eventfd(0, _EVENTFD))
    is_bound: bool = False

    def close(self) -> None:
        """Close the eventfds; copies of them notify nobody from now on."""
        os.close(self.to_guest)
        os.close(self.to_backend)


class Domain:
    """A guest: its memory, grant table and ports, and how often each of its pages is mapped."""

    def __init__(self, domid: int, pages: int) -> None:
        self.domid = domid
        self.pages = pages
        self.memory = _shared(f"rig-memory-{domid}", pages * PAGE)
        self.grants = _shared(f"rig-grants-{domid}", SIZE)
        self.table = Table(self.grants, pages)
        self.ports: dict[int, Port] = {}
        self._readers: dict[int, int] = {}
        self._writers: dict[int, int] = {}

    def pin(self, grefs: Sequence[int], step: int, *, writable: bool) -> None:
        """Count a new mapping of `grefs` (`step` 1) or its end (-1), and mark in the grant table which are in use."""
        counts = self._writers if writable else self._readers
        for gref in grefs:
            counts[gref] = counts.get(gref, 0) + step
            if not counts[gref]:
                del counts[gref]
            self.table.mark(gref, self._used(gref))

    def _used(self, gref: int) -> int:
        if gref in self._writers:
            return GTF_READING | GTF_WRITING
        return GTF_READING if gref in self._readers else 0

    def pins(self) -> int:
        """Return how many mappings of pages exist; a page that is mapped twice counts twice."""
        return sum(self._readers.values()) + sum(self._writers.values())

    def destroy(self) -> None:
        """End the domain: revoke its grants and close its ports; mappings stay."""
        self.table.entries[:] = memoryview(bytes(self.table.entries.nbytes)).cast("Q")
        for port in self.ports.values():
            port.close()
        os.close(self.memory)
        os.close(self.grants)


@dataclass(slots=True, eq=False)
class Holder:
    """Everything that one connection holds, which is released when it closes."""

    owned: Domain | None = None
    mappings: dict[int, tuple[Domain, list[int], bool]] = field(default_factory=dict)
    ports: dict[int, tuple[Domain, Port]] = field(default_factory=dict)


Answer = tuple[dict[str, Any], list[int]]  # a result, and the descriptors that go with it


class Hypervisor:
    """All domains, and the calls on them. A call raises KernelError if Xen or its devices would refuse it."""

    def __init__(self) -> None:
        self._domains: dict[int, Domain] = {}
        self._holders: set[Holder] = set()
        self._handles = count(1)
        self._local_ports = count(1)
        self._calls: dict[str, Callable[..., Answer]] = {
            "create": self._create, "open": self._open, "map": self._map, "unmap": self._unmap,
            "allocate_port": self._allocate_port, "close_port": self._close_port,
            "bind": self._bind, "unbind": self._unbind, "held": self._held,
        }  # fmt: skip

    def enter(self) -> Holder:
        """Return a new user of the hypervisor."""
        holder = Holder()
        self._holders.add(holder)
        return holder

    def call(self, holder: Holder, name: str, arguments: dict[str, Any]) -> Answer:
        """Make a call by its name. Raises: KernelError."""
        function = self._calls.get(name)
        if function is None:
            raise KernelError(f"the call {name!r}", errno.ENOSYS)
        return function(holder, **arguments)

    def leave(self, holder: Holder) -> None:
        """Release everything that a user holds; a domain dies with its owner."""
        for handle in list(holder.mappings):
            self._unmap(holder, handle)
        for port in list(holder.ports):
            self._unbind(holder, port)
        if holder.owned is not None:
            del self._domains[holder.owned.domid]
            holder.owned.destroy()
        self._holders.discard(holder)

    def _create(self, holder: Holder, domid: int, pages: int) -> Answer:
        if domid in self._domains or holder.owned is not None or domid == BACKEND_DOMID:
            raise KernelError(f"creating domain {domid}", errno.EEXIST)
        domain = holder.owned = self._domains[domid] = Domain(domid, pages)
        return {"pages": pages}, [domain.memory, domain.grants]

    def _open(self, _holder: Holder, domid: int) -> Answer:
        domain = self._domain(domid)
        return {"pages": domain.pages}, [domain.memory, domain.grants]

    def _map(self, holder: Holder, domid: int, grefs: list[int], *, writable: bool) -> Answer:
        domain = self._domain(domid)
        frames = [domain.table.frame(gref, BACKEND_DOMID, writable=writable) for gref in grefs]
        if not frames or min(frames) < 0:
            raise KernelError(f"mapping grants of domain {domid}", errno.EINVAL)
        domain.pin(grefs, 1, writable=writable)
        handle = next(self._handles)
        holder.mappings[handle] = (domain, grefs, writable)
        return {"handle": handle, "frames": frames}, []

    def _unmap(self, holder: Holder, handle: int) -> Answer:
        if handle not in holder.mappings:
            raise KernelError("unmapping what is not mapped", errno.ENOENT)
        domain, grefs, writable = holder.mappings.pop(handle)
        domain.pin(grefs, -1, writable=writable)
        return {}, []

    def _allocate_port(self, holder: Holder, remote_domid: int) -> Answer:
        domain = self._owned(holder)
        number = next(free for free in count(1) if free not in domain.ports)
        port = domain.ports[number] = Port(number, remote_domid)
        return {"port": number}, [port.to_guest, port.to_backend]

    def _close_port(self, holder: Holder, port: int) -> Answer:
        domain = self._owned(holder)
        if port not in domain.ports:
            raise KernelError(f"closing port {port}", errno.EINVAL)
        domain.ports.pop(port).close()
        return {}, []

    def _bind(self, holder: Holder, domid: int, port: int) -> Answer:
        domain = self._domain(domid)
        end = domain.ports.get(port)
        if end is None or end.is_bound or end.remote_domid != BACKEND_DOMID:
            raise KernelError(f"binding port {port} of domain {domid}", errno.EINVAL)
        end.is_bound = True
        os.eventfd_write(end.to_backend, 1)
        local = next(self._local_ports)
        holder.ports[local] = (domain, end)
        return {"port": local}, [end.to_backend, end.to_guest]

    def _unbind(self, holder: Holder, port: int) -> Answer:
        if port not in holder.ports:
            raise KernelError(f"closing port {port}", errno.ENOTCONN)
        holder.ports.pop(port)[1].is_bound = False
        return {}, []

    def _held(self, _holder: Holder, domid: int | None = None) -> Answer:
        domids = {domid} if domid is not None else {*self._domains}
        mappings = [each for holder in self._holders for each in holder.mappings.values()]
        ports = [each for holder in self._holders for each in holder.ports.values()]
        return {
            "mappings": sum(domain.domid in domids for domain, _, _ in mappings),
            "pins": sum(len(grefs) for domain, grefs, _ in mappings if domain.domid in domids),
            "ports": sum(domain.domid in domids for domain, _ in ports),
        }, []

    def _domain(self, domid: int) -> Domain:
        if domid not in self._domains:
            raise KernelError(f"finding domain {domid}", errno.ESRCH)
        return self._domains[domid]

    def _owned(self, holder: Holder) -> Domain:
        if holder.owned is None:
            raise KernelError("acting as a guest without a domain", errno.EPERM)
        return holder.owned


def _shared(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd
