"""Locks on an image: a flock, which all our processes respect, and the byte locks that QEMU's tools respect as well.

Must not open anything, wait, or decide what follows from a lock that somebody else holds.

Both belong to the open file description. A write in flight keeps the description, so the locks of a killed worker end
when its last write has landed, and not before: with the last copy of the descriptor, in whatever process that is.

QEMU's locks are OFD byte locks (fcntl(2), "Open file description locks"). All of them are shared, so taking one never
fails. A lock on byte 100 + n says "I do n", one on byte 200 + n says "nobody else may do n"; n is a permission. A
process that opens an image first takes its own locks, then checks whether another one forbids what it does, or does
what it forbids. So if two come at once, at least one sees the other.

Source: QEMU block/file-posix.c, `raw_apply_lock_bytes` and `raw_check_lock_bytes`; include/block/block-common.h for the
permissions.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from dataclasses import dataclass

_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # BLK_PERM_*, as numbers of bits
_DOES, _FORBIDS, _END = 100, 200, 300  # RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE, the end of QEMU's bytes
_DISKS = 1 << 62  # from here on there is a byte for each disk, far behind the end of any image
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_WITHOUT = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})  # the file system has no such locks


@dataclass(frozen=True, slots=True)
class Access:
    """What is done with an image, and what nobody else may do meanwhile, as QEMU's permissions."""

    does: tuple[int, ...]
    forbids: tuple[int, ...]
    is_alone: bool = False  # excludes all our other processes

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return _WRITE in self.does

    @property
    def is_shared(self) -> bool:
        """Whether others may write at the same time."""
        return not self.forbids


READ = Access((_CONSISTENT_READ,), (_WRITE, _RESIZE))
WRITE = Access((_CONSISTENT_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE), is_alone=True)
SHARED_READ = Access((_CONSISTENT_READ,), ())
SHARED_WRITE = Access((_CONSISTENT_READ, _WRITE), ())


def access(*, read_only: bool, shareable: bool) -> Access:
    """Return the access for an image that is opened this way; `shareable`: others may write to it, too."""
    if shareable:
        return SHARED_READ if read_only else SHARED_WRITE
    return READ if read_only else WRITE


def take(fd: int, wanted: Access, disk: int = -1) -> bool:
    """Take both kinds of locks without waiting. Return whether nobody conflicts; if not, no byte lock remains.

    If the file system has no byte locks, only the flock is taken. Raises: OSError.

    Args:
        fd: an image, open in the mode in which it will be used.
        wanted: what will be done with it.
        disk: a number that no other disk has. A worker that shares an image with other writers locks the byte of that
            number exclusively, so that its successor waits for the last of its writes.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if wanted.is_alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        if disk >= 0 and wanted.is_shared and wanted.writes:
            _set(fd, fcntl.F_WRLCK, _DISKS + disk)
        for byte in _bytes(wanted.does, wanted.forbids):
            _set(fd, fcntl.F_RDLCK, byte)
        if is_free(fd, wanted):
            return True
        drop(fd)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
        return True
    return False


def drop(fd: int) -> None:
    """Release the byte locks; the flock stays. Raises: OSError."""
    try:
        _set(fd, fcntl.F_UNLCK, 0, 0)
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise


def is_free(fd: int, wanted: Access) -> bool:
    """Return whether no byte lock of another open file description conflicts with `wanted`. Raises: OSError."""
    try:
        return not any(_is_taken(fd, byte) for byte in _bytes(wanted.forbids, wanted.does))
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
        return True


def _bytes(does: tuple[int, ...], forbids: tuple[int, ...]) -> list[int]:
    return [_DOES + each for each in does] + [_FORBIDS + each for each in forbids]


def _set(fd: int, kind: int, start: int, length: int = 1) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, start, length, 0))


def _is_taken(fd: int, byte: int) -> bool:
    """Return whether somebody else has locked a byte. A lock that covers more than QEMU's bytes is not one of QEMU's.

    On NFS a flock is such a lock, on the whole file: nfs(5), "local_lock".
    """
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    kind, _, start, length, _ = _FLOCK.unpack(found)
    return bool(kind != fcntl.F_UNLCK and start >= _DOES and 0 < length <= _END - start)
