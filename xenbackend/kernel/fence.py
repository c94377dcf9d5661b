"""A full memory fence from Python, and how it was found on this host.

Must not be used for anything but the ring: nothing else shares memory without a system call in between.

The protocol needs a fence in two places (R6, R7): between moving our producer index and reading the other side's event
index, and between setting our event index and the last look before sleeping. Without it, about one in six thousand
tight races loses a wake-up, and the guest hangs.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import threading
from functools import cache

from xenbackend.errors import KernelError
from xenbackend.kernel.ports import Fence

_SEQ_CST = 5  # memory_order_seq_cst, gcc's and clang's stdatomic.h
_X86 = {"x86_64", "AMD64", "i686"}
_LIBRARIES = (("libatomic.so.1", "atomic_thread_fence"), ("libgcc_s.so.1", "__sync_synchronize"))


def is_strongly_ordered(machine: str = "") -> bool:
    """Return whether loads stay in order among loads, and stores among stores, without a fence."""
    return (machine or platform.machine()) in _X86


def find_fence(machine: str = "") -> tuple[Fence, str]:
    """Return a full fence for this machine (or for `machine`, a name as in `uname -m`), and how it was found, in words.

    Raises: KernelError if the machine offers none.
    Cost: 0.1 us.
    """
    machine = machine or platform.machine()
    if is_strongly_ordered(machine):
        return _lock_fence(), "a lock's acquire and release: locked instructions, which x86 does not reorder"
    for library, symbol in _LIBRARIES:
        fence = _library_fence(library, symbol)
        if fence is not None:
            return fence, f"{symbol} of {library}"
    raise KernelError(f"find a memory fence for {machine} (install libatomic1)", errno.ENOSYS)


def _lock_fence() -> Fence:
    lock = threading.Lock()

    def fence() -> None:
        with lock:
            pass

    return fence


@cache  # so that a process behind walls still has it
def _library_fence(library: str, symbol: str) -> Fence | None:
    try:
        function = getattr(ctypes.PyDLL(library), symbol)  # PyDLL: it need not release the interpreter's lock
    except (OSError, AttributeError):
        return None
    function.restype = None

    def fence() -> None:
        function(_SEQ_CST)

    return fence
