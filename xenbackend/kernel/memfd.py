"""Memory that processes share by a descriptor, and whose size none of them can change any more.

Must not know what lies in it.

A process that touches a page of a mapping beyond the file's end is killed (SIGBUS). So nobody maps a memory that
somebody else could cut short: what is mapped has been sealed against that, and has the size that was expected. What
was never sealed is read by calls, and copied into a memory that is.

Source: memfd_create(2), fcntl(2) "File Sealing"; lseek(2) for SEEK_DATA.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from xenbackend.errors import KernelError

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PIECE = 1 << 20  # bytes of one read


def make(name: str, size: int) -> int:
    """Return the descriptor of a new memory of `size` zero bytes; `name` is for people. Raises: KernelError."""
    fd = -1
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except (OSError, OverflowError) as error:
        if fd >= 0:
            os.close(fd)
        raise KernelError(f"make a memory of {size} bytes", getattr(error, "errno", None) or errno.EFBIG) from None
    return fd


def is_memory(fd: int) -> bool:
    """Return whether a descriptor is a memory at all, sealed or not: closing one waits for nobody."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def is_sealed(fd: int, size: int) -> bool:
    """Return whether a descriptor is a memory of `size` bytes that nobody can change the size of."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS and os.fstat(fd).st_size == size
    except OSError:
        return False


def map_sealed(fd: int, size: int) -> memoryview:
    """Return the bytes of a memory, which stay mapped while a view of them lives; the descriptor may be closed.

    Raises: KernelError, also where `is_sealed` says no.
    """
    if not is_sealed(fd, size):
        raise KernelError(f"map {size} bytes that somebody else could cut short", errno.EPERM)
    try:
        return memoryview(mmap.mmap(fd, size))
    except (OSError, ValueError) as error:  # ValueError: of no bytes
        raise KernelError(f"map a memory of {size} bytes", getattr(error, "errno", None) or errno.EINVAL) from None


def wipe(fd: int) -> None:
    """Overwrite a memory of no more than a page, which may hold a key: who has it mapped sees zeros.

    Larger ones hold none. Raises: KernelError.
    """
    try:
        size = os.fstat(fd).st_size
        if size <= mmap.PAGESIZE:
            os.pwrite(fd, bytes(size), 0)
    except OSError as error:
        raise KernelError("overwrite a memory", error.errno or errno.EIO) from None


def read_into(fd: int, offset: int, target: memoryview) -> None:
    """Read `target` full of what lies from `offset` on, by calls; what is a hole or not there is left as it is.

    Raises: KernelError.
    """
    place, end = offset, offset + len(target)
    try:
        while place < end:
            place = os.lseek(fd, place, os.SEEK_DATA)
            hole = min(end, os.lseek(fd, place, os.SEEK_HOLE))
            while place < hole:
                length = os.preadv(fd, [target[place - offset : min(hole - offset, place - offset + _PIECE)]], place)
                if not length:
                    return
                place += length
    except OSError as error:
        if error.errno != errno.ENXIO:  # nothing but holes from there on
            raise KernelError("read a memory", error.errno or errno.EIO) from None


def copy(fd: int, name: str, limit: int) -> int:
    """Return a sealed memory with what is in another one; holes do not count, as they take no room.

    Raises: KernelError, also where it holds more than `limit` bytes.
    """
    found = os.fstat(fd)
    size, held = found.st_size, 512 * found.st_blocks
    if not is_memory(fd) or not size or held > limit:
        raise KernelError(f"copy a memory of {size} bytes, which holds {held}", errno.ENOMEM)
    made = make(name, size)
    try:
        read_into(fd, 0, map_sealed(made, size))
    except KernelError:
        os.close(made)
        raise
    return made
