"""The interface of a machine that a backend needs: grants and event channels. Xen and the rig both implement it.

Must not import its implementations by name: `open_host` finds them by a text that the supervisor passes to its workers.

Real:  `xenbackend.kernel.xen` (gntdev and evtchn).    Simulated:  `xenbackend.rig.host`.
Both pass `tests/contract/test_ports.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol, cast

from xenbackend.errors import ConfigError

Fence = Callable[[], None]  # a full memory fence: no load or store passes it in either direction

GRANT_OK = 0  # GNTST_okay, grant_table.h; with any other status the copy did not take place


class Mapping(Protocol):
    """Granted pages, mapped side by side in the order asked for."""

    view: memoryview  # bytes, PAGE * number of grefs
    address: int  # of the first byte, in this process

    def release(self) -> None:
        """Unmap. No view of the mapping may be used any more."""


@dataclass(slots=True)
class Arena:
    """Page-aligned memory of this process, the near side of grant copies."""

    view: memoryview
    address: int  # of the first byte, in this process


class CopySegment(NamedTuple):
    """One grant copy. A named tuple: the data path makes one per page, and a dataclass costs five times as much.

    The `length` bytes must lie within one page on the far side, which is the guest's.
    """

    gref: int
    page_offset: int  # far side, bytes from the start of the granted page
    arena_offset: int  # near side, bytes from the start of the arena
    length: int
    to_guest: bool


class GrantTable(Protocol):
    """Access to pages that one domain has granted to us (`/dev/xen/gntdev`)."""

    def map(self, grefs: Sequence[int], *, writable: bool) -> Mapping:
        """Map pages, all or none. Raises: KernelError."""

    def copy(self, arena: Arena, segments: Sequence[CopySegment]) -> Sequence[int]:
        """Copy, and return one status per segment (`GRANT_OK` or not). Raises: KernelError if nothing was tried."""

    def close(self) -> None:
        """Release the device and every mapping that is left."""


class EventChannels(Protocol):
    """Event channels of this process towards one domain (`/dev/xen/evtchn`).

    A port that has fired stays masked until `unmask` (lateeoi). Unmask it when the work is done, not earlier.
    """

    def fileno(self) -> int:
        """Return a descriptor that is readable while a port is pending."""

    def bind(self, remote_port: int) -> int:
        """Bind an inter-domain channel and return the local port; it is pending at once. Raises: KernelError."""

    def pending(self) -> Sequence[int]:
        """Return the ports that fired, without blocking; they stay masked."""

    def unmask(self, port: int) -> None:
        """Let the port fire again; it fires at once if it was notified meanwhile."""

    def notify(self, port: int) -> None:
        """Notify the other side. Never fails: a peer that has gone is not our error."""

    def unbind(self, port: int) -> None:
        """Close the port. Raises: KernelError."""

    def close(self) -> None:
        """Close every port and the device."""


class Host(Protocol):
    """The machine that this process runs on. It opens the devices, each restricted to one frontend domain.

    A host that was given devices (`open_devices`) uses them, for the domain for which they were opened, and opens none.
    """

    fence: Fence

    def open_grants(self, domid: int) -> GrantTable:
        """Open the grant device for `domid`. Raises: KernelError."""

    def open_events(self, domid: int) -> EventChannels:
        """Open the event channel device for `domid`. Raises: KernelError."""

    def allocate(self, size: int) -> Arena:
        """Return page-aligned memory of `size` bytes."""


def open_host(text: str, devices: Sequence[int] = ()) -> Host:
    """Return the host that a text such as ``xenbackend.kernel.xen`` or ``xenbackend.rig.host:/run/rig`` names.

    Args:
        text: before the colon, a module with the functions `open_host(argument, devices)` and `open_devices(argument,
            domid)`; after it, their argument. The text comes from the supervisor's settings, never from xenstore.
        devices: descriptors from `open_devices`. They stay the caller's, which keeps them open as long as the host is
            used. Without them the host opens its own.
    """
    return cast("Host", load_host(text).open_host(text.partition(":")[2], devices))


def open_devices(text: str, domid: int) -> list[int]:
    """Open the grant device and the event channel device of the host that `text` names, the latter for one domain only.

    Mappings and bound ports of a device live as long as any copy of its descriptor. Raises: KernelError.
    """
    return cast("list[int]", load_host(text).open_devices(text.partition(":")[2], domid))


def load_host(text: str) -> ModuleType:
    """Import the module that `text` names, and return it; open nothing."""
    return importlib.import_module(text.partition(":")[0])


def check_host(text: str) -> None:
    """Check that the module exists that `text` names, without importing more than its package. Raises: ConfigError."""
    name = text.partition(":")[0]
    try:
        is_there = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        is_there = False
    if not is_there:
        raise ConfigError(f"host: there is no module {name!r}; leave it out to use the default")
