"""How long the machine has had nothing to do: the only clock that a slow or a busy host does not put forward.

Must not look at dom0 alone: while it waits, a guest may work.

Whatever time-out of ours there is in dom0 goes by it: something that does not happen although nobody has anything to do
does not happen at all. Something that is worked on without an end is ended by the host (`bed/boot.py`).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

LIBRARIES = ("/usr/lib", "/lib")


def idle_s() -> list[float]:
    """Return how long each physical CPU has had nothing to do since the machine was booted.

    Source: Xen, xen/include/public/sysctl.h, XEN_SYSCTL_getcpuinfo (`idletime`, ns), by tools/include/xenctrl.h.
    """
    library, handle = _xen()
    idle, count = (ctypes.c_uint64 * os.cpu_count())(), ctypes.c_int()
    if library.xc_getcpuinfo(handle, len(idle), idle, ctypes.byref(count)):
        raise OSError(ctypes.get_errno(), "xc_getcpuinfo")
    return [each / 1e9 for each in idle[: count.value]]


class Patience:
    """How long the CPU that had most to do has been idle since this was made."""

    def __init__(self) -> None:
        self._before = idle_s()

    def spent_s(self) -> float:
        """Return it, in seconds."""
        return min(now - before for before, now in zip(self._before, idle_s(), strict=True))


@cache
def _xen() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    file = next(found for place in LIBRARIES for found in Path(place).glob("**/libxenctrl.so.*"))
    library = ctypes.CDLL(str(file), use_errno=True)
    library.xc_interface_open.restype = ctypes.c_void_p
    library.xc_getcpuinfo.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    handle = library.xc_interface_open(None, None, 0)
    if not handle:
        raise OSError(ctypes.get_errno(), "xc_interface_open")
    return library, ctypes.c_void_p(handle)
