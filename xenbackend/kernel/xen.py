"""The real host: `/dev/xen/gntdev` and `/dev/xen/evtchn`.

Must not hold a rule of its own; it only opens.
"""

from __future__ import annotations

from xenbackend.kernel import memory
from xenbackend.kernel.evtchn import Evtchn
from xenbackend.kernel.fence import find_fence
from xenbackend.kernel.gntdev import Gntdev
from xenbackend.kernel.ports import Arena


class XenHost:
    """Implements `kernel.ports.Host`. Raises: KernelError, if the machine offers no memory fence."""

    def __init__(self) -> None:
        self.fence, self.fence_found = find_fence()

    def open_grants(self, domid: int) -> Gntdev:
        """Open the grant device for `domid`. Raises: KernelError."""
        return Gntdev(domid)

    def open_events(self, domid: int) -> Evtchn:
        """Open the event channel device, restricted to `domid`. Raises: KernelError."""
        return Evtchn(domid)

    def allocate(self, size: int) -> Arena:
        """Return page-aligned memory of `size` bytes."""
        return memory.allocate(size)


def open_host(argument: str) -> XenHost:  # noqa: ARG001 - there is only one
    """Return the Xen host that this process runs on; called by `kernel.ports.open_host`."""
    return XenHost()
