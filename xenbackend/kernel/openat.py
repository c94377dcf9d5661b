"""Opens a name so that it cannot lead out of a directory, whoever exchanges what lies on the way: step by step.

Must not follow a link, nor open anything for reading or writing before whoever asks has looked what it is: a descriptor
of O_PATH stands for the file and does nothing to it. `reopen` opens that very file, whatever its name means by then.

openat2(2) would do it in one call, but systemd answers that with ENOSYS in a unit with RestrictSUIDSGID, as ours is.

Sources: open(2), O_PATH, O_NOFOLLOW; proc(5), /proc/pid/fd.
"""

from __future__ import annotations

import errno
import os
import stat

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_beneath(directory: int, name: str) -> int:
    """Return an O_PATH descriptor of what a name is beneath a directory, without following any link.

    Args:
        directory: a descriptor of it, which may be one of O_PATH.
        name: relative, without links and without ``..``.

    Raises: OSError; ELOOP where there is a link on the way, EXDEV where the name leads out of the directory.
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
    """Return an O_PATH descriptor of what is called so in a directory. Raises: OSError; ELOOP where it is a link."""
    try:
        # A place where something is mounted as soon as it is used has to be used: O_DIRECTORY does that.
        fd = os.open(name, _STEP if is_last else _STEP | os.O_DIRECTORY, dir_fd=directory)
    except NotADirectoryError:
        fd = os.open(name, _STEP, dir_fd=directory)  # a link, or a file, beneath which the next step finds nothing
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return fd


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
