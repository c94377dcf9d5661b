"""Opens a name so that it cannot lead out of a directory, whoever exchanges what lies on the way meanwhile: openat2.

Must not follow a link, nor open anything for reading or writing before whoever asks has looked what it is: a descriptor
of O_PATH stands for the file and does nothing to it. `reopen` opens that very file, whatever its name means by then.

Sources: openat2(2), linux/openat2.h; open(2), O_PATH; proc(5), /proc/pid/fd.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from xenbackend.errors import KernelError

_SYS_OPENAT2 = 437  # the same on all architectures that Xen has (asm-generic/unistd.h)
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08  # RESOLVE_*, linux/openat2.h
_HOW = struct.Struct("QQQ")  # struct open_how: flags, mode, resolve
_TRIES = 64  # EAGAIN: somebody renamed a directory on the way, or mounted something, while the kernel went there

_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(directory: int, name: str) -> int:
    """Return an O_PATH descriptor of what a name is beneath a directory, without following any link.

    Args:
        directory: a descriptor of it, which may be one of O_PATH.
        name: relative, without links.

    Raises: OSError; ELOOP where there is a link on the way, EXDEV where the name leads out of the directory.
        KernelError, where the kernel is older than openat2.
    """
    flags = os.O_PATH | os.O_CLOEXEC
    how = _HOW.pack(flags, 0, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)
    path = os.fsencode(name)
    for _ in range(_TRIES):
        fd = _libc.syscall(ctypes.c_long(_SYS_OPENAT2), directory, path, how, ctypes.c_size_t(len(how)))
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        if code == errno.ENOSYS:
            raise KernelError("open what an image names, by openat2 (Linux 5.6 or later)", code)
        if code != errno.EAGAIN:
            break
    raise OSError(code, os.strerror(code), name)


def open_place(path: str) -> int:
    """Return an O_PATH descriptor of a file, device or directory that an administrator names; links are followed.

    Raises: OSError.
    """
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def reopen(fd: int, flags: int) -> int:
    """Open once more the file that a descriptor is of. Raises: OSError."""
    return os.open(link_to(fd), flags | os.O_CLOEXEC)


def link_to(fd: int) -> str:
    """Return a path for calls that take none but a path: of the file that a descriptor of this process is of."""
    return f"/proc/self/fd/{fd}"


def path_of(fd: int) -> str:
    """Return the path, without links, that a descriptor's file has at this moment. Raises: OSError."""
    return os.readlink(link_to(fd))  # noqa: PTH115 - a path, not always text that pathlib would keep
