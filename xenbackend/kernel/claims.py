"""Block devices are opened so that nobody else uses them: who writes claims one, who reads sees that nobody has.

Must not decide what becomes of a device in use, nor open a regular file in another way than open(2).

A claim is what the kernel takes for a mount, swap, dm, md, LVM and the like, and what open(2) takes by O_EXCL: one for
a device, under whatever name, and for a disk and its partitions together. It lasts as long as the open file
description, and a second one is refused also within one process. A look for a claim takes one for a moment: of two
who look at once, one may see the other.

Sources: open(2), O_EXCL without O_CREAT; Linux block/bdev.c, `bd_may_claim`; linux/fs.h, BLKROGET.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from xenbackend.kernel import blkback

_BLKROGET = 0x125E  # linux/fs.h
_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def open_medium(node: int, *, read_only: bool, claims: bool = True) -> int:
    """Open what a descriptor made by O_PATH is of, and return a descriptor with a description of its own.

    Args:
        node: stays the caller's.
        read_only: for reading only.
        claims: have a block device to oneself: claimed for writing; for reading, without a claim of somebody who
            might write. Without it, it is opened whoever else uses it.

    Raises: OSError, as open(2) would; EBUSY where somebody else uses the device.
    """
    place = _place(node)
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    status = os.fstat(node)
    if not (claims and stat.S_ISBLK(status.st_mode)):
        return os.open(place, flags)
    if any(blkback.disks_on(status.st_rdev, by_writers=read_only)):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    if not read_only:
        return os.open(place, flags | os.O_EXCL)
    fd = os.open(place, flags)
    try:
        if _is_claimed(fd, by_writers=True):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_in_use(fd: int, *, by_writers: bool = False) -> bool:
    """Return whether somebody uses an open block device; `by_writers`: and could write to it. Raises: OSError."""
    if any(blkback.disks_on(os.fstat(fd).st_rdev, by_writers=by_writers)):
        return True
    return _is_claimed(fd, by_writers=by_writers)


def _is_claimed(fd: int, *, by_writers: bool) -> bool:
    if by_writers and _is_read_only(fd):
        return False
    try:
        os.close(os.open(_place(fd), _LOOK | os.O_EXCL))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    return False


def _is_read_only(fd: int) -> bool:
    (value,) = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    return bool(value)


def _place(fd: int) -> str:
    return f"/proc/self/fd/{fd}"
