"""The real host: `/dev/xen/gntdev` and `/dev/xen/evtchn`.

Must not hold a rule of its own; it only opens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from xenbackend.errors import KernelError
from xenbackend.kernel import evtchn, gntdev, memory
from xenbackend.kernel.evtchn import Evtchn
from xenbackend.kernel.fence import find_fence
from xenbackend.kernel.gntdev import Gntdev
from xenbackend.kernel.ports import Arena


class XenHost:
    """Implements `kernel.ports.Host`. Raises: KernelError, if the machine offers no memory fence."""

    def __init__(self, devices: Sequence[int] = ()) -> None:
        """`devices` are descriptors from `open_devices`, which stay the caller's; without them it opens its own."""
        self.fence, self.fence_found = find_fence()
        self._devices = devices

    def open_grants(self, domid: int) -> Gntdev:
        """Open the grant device for `domid`. Raises: KernelError."""
        return Gntdev(domid, os.dup(self._devices[0]) if self._devices else gntdev.open_device())

    def open_events(self, domid: int) -> Evtchn:
        """Open the event channel device, restricted to `domid`. Raises: KernelError."""
        return Evtchn(domid, os.dup(self._devices[1]) if self._devices else evtchn.open_device(domid))

    def allocate(self, size: int) -> Arena:
        """Return page-aligned memory of `size` bytes."""
        return memory.allocate(size)


def open_host(argument: str, devices: Sequence[int] = ()) -> XenHost:  # noqa: ARG001 - there is only one
    """Return the Xen host that this process runs on; called by `kernel.ports.open_host`."""
    return XenHost(devices)


def open_devices(argument: str, domid: int) -> list[int]:  # noqa: ARG001 - the same
    """Open both devices, as `kernel.ports.open_devices`. Raises: KernelError.

    Before Linux 5.5 a grant device maps only for the process that opened it where the dom0 is PV.
    """
    grants = gntdev.open_device()
    try:
        return [grants, evtchn.open_device(domid)]
    except KernelError:
        os.close(grants)
        raise
