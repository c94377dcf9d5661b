"""Opens a name step by step, so that it cannot lead out of a directory even if somebody exchanges parts of the path.

Must not follow a link, nor open anything for reading or writing before the caller has checked what it is: an O_PATH
descriptor refers to a file and does nothing to it. `reopen` opens that very file, whatever its name means by then.

openat2(2) would do this in one call, but in a unit with RestrictSUIDSGID, such as ours, systemd makes it fail with
ENOSYS.

Sources: open(2), O_PATH, O_NOFOLLOW; proc(5), /proc/pid/fd.
"""

from __future__ import annotations

import errno
import os
import stat

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_beneath(directory: int, name: str) -> int:
    """Return an O_PATH descriptor of the file with this name beneath a directory, without following any link.

    Args:
        directory: a descriptor of the directory, which may be an O_PATH one.
        name: relative, without links and without ``..``.

    Raises: OSError; ELOOP if any part of the name is a link, EXDEV if the name leads out of the directory.
    """
    steps = [step for step in name.split("/") if step not in ("", ".")]
    if name.startswith("/") or ".." in steps:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    fd = os.open(".", _STEP, dir_fd=directory)
    for number, step in enumerate(steps, 1):
        former = fd
        try:
            fd = _step(former, step, is_last=number == len(steps))
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from None
        finally:
            os.close(former)
    return fd


def _step(directory: int, name: str, *, is_last: bool) -> int:
    """Return an O_PATH descriptor of an entry of a directory. Raises: OSError; ELOOP if it is a link."""
    try:
        # O_DIRECTORY makes an automount point mount its file system; O_PATH alone does not.
        fd = os.open(name, _STEP if is_last else _STEP | os.O_DIRECTORY, dir_fd=directory)
    except NotADirectoryError:
        fd = os.open(name, _STEP, dir_fd=directory)  # a link, or a file, below which the next step finds nothing
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return fd


def open_place(path: str) -> int:
    """Return an O_PATH descriptor of a file, device or directory that an administrator has named; links are followed.

    Raises: OSError.
    """
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def reopen(fd: int, flags: int) -> int:
    """Open the file behind a descriptor once more, with these flags. Raises: OSError."""
    return os.open(link_to(fd), flags | os.O_CLOEXEC)


def link_to(fd: int) -> str:
    """Return a path of the file behind a descriptor of this process, for calls that only accept a path."""
    return f"/proc/self/fd/{fd}"


def path_of(fd: int) -> str:
    """Return the present path of the file behind a descriptor, without links. Raises: OSError."""
    return os.readlink(link_to(fd))  # noqa: PTH115 - pathlib might change the path
