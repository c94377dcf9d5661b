"""The real host: `/dev/xen/gntdev` and `/dev/xen/evtchn`.

Must not contain any rules: it only opens the devices.
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
    """Implements `kernel.ports.Host`. Raises: KernelError if the machine offers no memory fence."""

    def __init__(self, devices: Sequence[int] = ()) -> None:
        """Use `devices`, descriptors from `open_devices` that stay the caller's; if there are none, open our own."""
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
    """Return the Xen host on which this process runs; `kernel.ports.open_host` calls this."""
    return XenHost(devices)


def open_devices(argument: str, domid: int) -> list[int]:  # noqa: ARG001 - the same
    """Open both devices, as `kernel.ports.open_devices` says. Raises: KernelError.

    In a PV dom0 before Linux 5.5, only the process that opened a grant device can map grants by it.
    """
    grants = gntdev.open_device()
    try:
        return [grants, evtchn.open_device(domid)]
    except KernelError:
        os.close(grants)
        raise
