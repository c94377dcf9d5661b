"""Finds images that Xen's QEMU serves to guests. QEMU neither locks nor claims them, so its descriptors are examined.

Must not examine any process unless there are signs of a QEMU that works for Xen, nor ask a file system that might not
answer.

Sources: QEMU hw/block/xen-block.c, `xen_block_drive_create` ("locking": "off"); Linux drivers/xen/xenbus, which shows
backends on its bus if they were there before QEMU was; Xen tools/libs/light/libxl_dm.c, which gives each QEMU a socket;
proc_pid_fdinfo(5), `flags`, and `ino` since Linux 5.14.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress

from xenbackend.kernel import blkback
from xenbackend.kernel.process import text_of

SOCKETS = "/run/xen"
_SIGNS = ("qdisk-", "qmp-libxl-")  # how names on the bus and of sockets begin
_QEMU = "qemu-system"  # part of the process's name; distributions may put a prefix before it
_FLAGS = re.compile(r"^flags:\s*([0-7]+)$", re.MULTILINE)
_INODE = re.compile(r"^ino:\s*(\d+)$", re.MULTILINE)


def users_of(fd: int, *, by_writers: bool = False) -> Iterator[str]:
    """Yield the QEMU processes that have the file or block device of `fd` open, in words that follow "it is in use by".

    `by_writers`: only processes that could write to it.
    """
    if not (_has_signs(blkback.BUS) or _has_signs(SOCKETS)):
        return
    status = os.fstat(fd)
    for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - at every opening
        with suppress(OSError):  # the process has ended
            if _QEMU in text_of(f"/proc/{pid}/comm") and _has(pid, status, by_writers):
                yield f"QEMU, which serves a guest (process {pid})"


def _has_signs(directory: str) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError):  # not a Xen host
        return any(name.startswith(_SIGNS) for name in os.listdir(directory))  # noqa: PTH208 - as above
    return False


def _has(pid: str, status: os.stat_result, by_writers: bool) -> bool:  # noqa: FBT001 - handed on
    return any(_is_it(pid, fd, status, by_writers) for fd in os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - as above


def _is_it(pid: str, fd: str, status: os.stat_result, by_writers: bool) -> bool:  # noqa: FBT001 - handed on
    with suppress(OSError, ValueError):  # it was closed
        facts, place = text_of(f"/proc/{pid}/fdinfo/{fd}"), f"/proc/{pid}/fd/{fd}"
        flags, inode = _FLAGS.search(facts), _INODE.search(facts)
        if by_writers and flags and int(flags[1], 8) & os.O_ACCMODE == os.O_RDONLY:
            return False
        if stat.S_ISBLK(status.st_mode):
            if not os.readlink(place).startswith("/dev/"):  # noqa: PTH115 - the same
                return False
            found = os.stat(place)  # noqa: PTH116 - the same
            return stat.S_ISBLK(found.st_mode) and found.st_rdev == status.st_rdev
        if inode is None or int(inode[1]) == status.st_ino:
            return os.path.samestat(os.stat(place), status)  # noqa: PTH116 - the same
    return False
