"""Opens block devices so that nobody else uses them: a writer claims the device, a reader checks for claims.

Must not decide what happens if a device is in use, nor open a regular file in another way than open(2) does.

The kernel takes a claim for a mount, swap, dm, md, LVM and the like; open(2) takes one with O_EXCL. A device has at
most one claim, under whatever name it was opened; a disk and its partitions share one. A claim lasts as long as the
open file description, and a second one is refused even within the same process. To check for a claim, one is taken for
a moment, so if two processes check at once, one may see the claim of the other.

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
    """Open the file of an O_PATH descriptor, and return a descriptor with its own open file description.

    Args:
        node: the O_PATH descriptor, which stays open and belongs to the caller.
        read_only: open for reading only.
        claims: exclude other users of a block device: for writing, claim it; for reading, refuse it if somebody who
            could write has claimed it. If false, the device is opened whoever else uses it.

    Raises: OSError, as open(2); EBUSY if somebody else uses the device.
    """
    place = _place(node)
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
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
    """Return whether somebody uses an open block device; with `by_writers`, only if that user could write to it.

    Raises: OSError.
    """
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
