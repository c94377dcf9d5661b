"""The simulated machine without its socket: guest, worker and hypervisor in one thread, which call each other.

Must not have a rule of Xen's: `rig/hypervisor.py` has them, and every call goes there. What lies on a socket costs a
hundred times as much, and a guest with persistent grants makes a call for every few messages.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tests.driven import DOMID
from tests.served import Served
from xenbackend.rig.guest import Guest
from xenbackend.rig.host import RigHost
from xenbackend.rig.hypervisor import Hypervisor
from xenbackend.rig.wire import Connection


class NearConnection(Connection):
    """One user of the hypervisor, as on a socket: descriptors come as copies, and what it holds goes when it closes."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        """Enter as a user."""
        self._hypervisor = hypervisor
        self._holder = hypervisor.enter()

    def call(self, name: str, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
        """Make one call. Raises: KernelError."""
        answer, descriptors = self._hypervisor.call(self._holder, name, arguments)
        return answer, [os.dup(fd) for fd in descriptors]

    def close(self) -> None:
        """Leave, and release everything that it holds."""
        self._hypervisor.leave(self._holder)


class NearXen:
    """A hypervisor as `rig.xen.Xen` is one, for whoever is in this thread."""

    def __init__(self) -> None:
        self._hypervisor = Hypervisor()

    def connect(self) -> NearConnection:
        """Return a new user's connection."""
        return NearConnection(self._hypervisor)

    def held(self, domid: int | None = None) -> dict[str, int]:
        """Return what one domain or all backends hold, as `Xen.held` does."""
        connection = self.connect()
        try:
            return connection.call("held", domid=domid)[0]
        finally:
            connection.close()

    def close(self) -> None:
        """Do nothing: whoever has connected closes."""


class NearHost(RigHost):
    """The machine of a backend that is in the hypervisor's thread."""

    def __init__(self, xen: NearXen, devices: Sequence[int] = ()) -> None:
        super().__init__("", devices)
        self._xen = xen

    def _connect(self, _number: int) -> NearConnection:
        return self._xen.connect()


class NearServed(Served):
    """`Served` in one thread."""

    def begin(self) -> None:
        """Make the machine and its guest."""
        self.xen: Any = NearXen()
        self.guest = Guest("", DOMID, pages=8192, connection=self.xen.connect())

    def open_host(self) -> NearHost:
        """Return the backend's machine."""
        return NearHost(self.xen)
