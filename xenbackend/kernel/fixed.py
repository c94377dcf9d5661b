"""Pages of a file mapped side by side in a chosen order: the rig's substitute for a grant mapping.

Must not know a grant. The standard library's `mmap` cannot place a mapping at an address, so the C library is called.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Callable, Sequence
from itertools import pairwise

from xenbackend.errors import KernelError
from xenbackend.kernel.memory import unmap, view_at
from xenbackend.units import PAGE

_MAP_FIXED = 0x10  # Linux, include/uapi/asm-generic/mman-common.h
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip


def map_pages(fd: int, frames: Sequence[int], *, writable: bool) -> tuple[memoryview, int, Callable[[], None]]:
    """Map the pages of the file `fd` whose numbers are `frames`, shared, one after the other in that order.

    Returns: a view of all their bytes, the address of the first byte, and a function that unmaps them. The view must
    not be used after that; nothing checks this.
    Raises: KernelError, with nothing mapped.
    """
    if not frames:
        raise KernelError("mapping no pages", errno.EINVAL)
    size = len(frames) * PAGE
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _map(0, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    try:
        place = address
        for first, count in _runs(frames):
            _map(place, count * PAGE, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, first * PAGE)
            place += count * PAGE
    except KernelError:
        unmap(address, size)
        raise
    return view_at(address, size, writable=writable), address, lambda: unmap(address, size)


def _runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    # One system call for each run of adjacent pages instead of one for each page.
    starts = [0, *(place for place, (one, two) in enumerate(pairwise(frames), 1) if two != one + 1), len(frames)]
    return [(frames[start], end - start) for start, end in pairwise(starts)]


def _map(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result = _libc.mmap(address or None, size, protection, flags, fd, offset)
    if result == _FAILED:
        raise KernelError(f"mapping {size} bytes", ctypes.get_errno())
    return int(result)
