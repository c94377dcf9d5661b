"""Memory that processes share through a descriptor, sealed so that none of them can change its size.

Must not know what the memory contains.

A process that touches a page of a mapping beyond the end of the file is killed (SIGBUS). So no process maps a memory
that another one could truncate: a mapped memory is sealed against that, and has the expected size. A memory that is not
sealed is read by system calls, and copied into a sealed one.

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
    """Return the descriptor of a new sealed memory of `size` zero bytes; `name` is for people. Raises: KernelError."""
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


def private(size: int) -> memoryview:
    """Return `size` zero bytes that have no descriptor: only this process has them. Raises: OSError."""
    return memoryview(mmap.mmap(-1, size))


def is_memory(fd: int) -> bool:
    """Return whether a descriptor is a memory, sealed or not."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def is_sealed(fd: int, size: int) -> bool:
    """Return whether a descriptor is a memory of `size` bytes whose size nobody can change."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS and os.fstat(fd).st_size == size
    except OSError:
        return False


def map_sealed(fd: int, size: int) -> memoryview:
    """Return the bytes of a memory. They stay mapped as long as a view of them lives; the descriptor may be closed.

    Raises: KernelError, also if `is_sealed` is false.
    """
    if not is_sealed(fd, size):
        raise KernelError(f"map {size} bytes that somebody else could cut short", errno.EPERM)
    try:
        return memoryview(mmap.mmap(fd, size))
    except (OSError, ValueError) as error:  # ValueError: of a size of 0
        raise KernelError(f"map a memory of {size} bytes", getattr(error, "errno", None) or errno.EINVAL) from None


def wipe(fd: int) -> None:
    """Overwrite a memory of at most a page with zeros, which all processes that have it mapped see: it may hold a key.

    Larger memories hold no keys, and are left alone. Raises: KernelError.
    """
    try:
        size = os.fstat(fd).st_size
        if size <= mmap.PAGESIZE:
            os.pwrite(fd, bytes(size), 0)
    except OSError as error:
        raise KernelError("overwrite a memory", error.errno or errno.EIO) from None


def read_into(fd: int, offset: int, target: memoryview) -> None:
    """Fill `target` with the bytes from `offset` on, by system calls.

    Bytes of `target` for which the memory has a hole, or has ended, are left unchanged. Raises: KernelError.
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
        if error.errno != errno.ENXIO:  # ENXIO: there is no data from there on
            raise KernelError("read a memory", error.errno or errno.EIO) from None


def copy(fd: int, name: str, limit: int) -> int:
    """Return a new sealed memory with the content of another one.

    Raises: KernelError, also if the other one holds more than `limit` bytes; holes do not count.
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
