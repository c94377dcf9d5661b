"""The steps of opening a file: hold it, look at it, and open for real what is held.

Must not decide who may open what, nor wait for a lock.

A name is looked up once, by O_PATH. That does not open the file, so no device notices it and no pipe waits. Then the
held file is opened by /proc/self/fd, whatever its name means by then (open(2), "O_PATH").
"""

from __future__ import annotations

import errno
import os
import stat

from xenbackend.errors import DriverError, printable
from xenbackend.kernel import blockdev, identity, inuse
from xenbackend.kernel.claims import open_medium
from xenbackend.kernel.inuse import InUse
from xenbackend.kernel.locks import Access
from xenbackend.protocol.opening import Facts


def hold(path: str) -> int:
    """Return an O_PATH descriptor of a file that can be an image. Raises: DriverError, if it cannot be one; OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        blockdev.check_kind(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def hold_record(path: str, *, create: bool) -> int:
    """Return an O_PATH descriptor of a regular file; with `create`, make it if it is not there, for its owner only.

    A link is not followed: a user who may write to the directory could have it lead to any file.

    Raises: DriverError, if it is not a regular file; OSError.
    """
    if create and not os.path.lexists(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            os.close(os.open(path, flags, 0o600))
        except FileNotFoundError:
            _check_directory(path)
            raise
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DriverError(f"{path} is not a regular file", path=path)
    return fd


def hold_record_or_stand_in(path: str, *, is_in_service: bool = False) -> tuple[int, bool]:
    """Return an O_PATH descriptor of a record file, or of one that stands for it, so that no file is made or begun.

    A new, empty file without a name stands for one that is not there, in the same directory, so that whatever would
    fail there fails. One among the temporary files stands for an empty file, which is a new one, too, unless that
    `is_in_service`.

    Returns: the descriptor, and whether the file is another one. Raises: DriverError, OSError, as `hold_record`.
    """
    try:
        held = hold_record(path, create=False)
    except FileNotFoundError:
        return _hold_stand_in(path), True
    if is_in_service or os.fstat(held).st_size:
        return held, False
    import tempfile  # late: few look at a new file

    try:
        os.close(reopen(held, path, write=True))  # it may be immutable, or mounted read-only
        return _unnamed(tempfile.gettempdir()), True
    finally:
        os.close(held)


def _hold_stand_in(path: str) -> int:
    try:
        return _unnamed(os.path.split(path)[0] or ".")
    except OSError as error:
        error.filename = path
        if error.errno == errno.ENOENT:
            _check_directory(path)
        raise


def _check_directory(path: str) -> None:
    """Refuse a file to be created whose directory does not exist. Raises: DriverError."""
    directory = os.path.split(path)[0] or "."
    if not os.path.lexists(directory):
        problem = f"{printable(path)} cannot be created, as there is no directory {printable(directory)}; make it first"
        raise DriverError(problem, path=path, errno=errno.ENOENT)


def hold_unnamed(directory: str) -> int:
    """Return an O_PATH descriptor of a new, empty file without a name, for its owner only.

    It goes with its last descriptor. On a file system that cannot make one (O_TMPFILE, open(2)) it is made with a name
    that is removed at once: such a file can never be named again. Raises: DriverError, OSError.
    """
    if not directory:
        raise DriverError("no directory for unnamed files is configured; see the setting scratch", errno=errno.EACCES)
    try:
        return _unnamed(directory)
    except OSError as error:
        problem = f"cannot make an unnamed file in {printable(directory)}, the directory of the setting scratch"
        raise DriverError(f"{problem}: {error.strerror}", path=directory, errno=error.errno or errno.EIO) from error


def _unnamed(directory: str) -> int:
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        import tempfile  # late: most file systems can make one, and a look at an image should import little

        fd, name = tempfile.mkstemp(prefix=".xenbackend-", dir=directory)
        os.unlink(name)  # noqa: PTH108 - as all here
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(fd)


def give_name(fd: int, path: str) -> None:
    """Give an unnamed file that is held its name, durably; if it has the name already, only make that durable.

    An earlier opener may have been killed between the two. Raises: DriverError, if it cannot have that name.
    """
    directory, name = os.path.split(path)
    try:
        parent = os.open(directory or ".", os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
        try:
            _link(fd, parent, name, path)
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        why = {
            errno.EXDEV: "it is on another file system than the unnamed file; name a file in the directory of the "
            "setting scratch, or on its file system",
            errno.ENOENT: "there is no such directory, or the file system of the setting scratch cannot name an "
            "unnamed file",
        }.get(error.errno or 0, error.strerror)
        problem = f"the unnamed file cannot be given the name {printable(path)}: {why}"
        raise DriverError(problem, path=path, errno=error.errno or errno.EIO) from error


def _link(fd: int, parent: int, name: str, path: str) -> None:
    """Link an unnamed file into a directory, unless it is there. Raises: DriverError, if another file is; OSError."""
    try:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent)
    except FileExistsError:
        found, held = os.stat(name, dir_fd=parent, follow_symlinks=False), os.fstat(fd)
        if (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            problem = f"{printable(path)} exists already, and is not overwritten; choose another name or remove it"
            raise DriverError(problem, path=path, errno=errno.EEXIST) from None


def identify(fd: int) -> str:
    """Return the identity of a file that is held, as `kernel.identity` writes it. Raises: KernelError."""
    return identity.to_text(identity.identify(fd))


def look(fd: int, path: str) -> Facts:
    """Return the facts of a file that is held. Raises: OSError, KernelError."""
    status = os.fstat(fd)
    is_device = stat.S_ISBLK(status.st_mode)
    return Facts(
        identity=identify(fd),
        is_device=is_device,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        discard_granularity=blockdev.find_granularity(status.st_rdev) if is_device else 0,
        real=os.path.realpath(path),
    )


def reopen(fd: int, path: str, *, write: bool, claims: bool = False) -> int:
    """Return a descriptor of a new open file description.

    Raises: OSError, about `path`; with EBUSY if it `claims` a block device that somebody else uses.
    """
    try:
        return open_medium(fd, read_only=not write, claims=claims)
    except OSError as error:
        error.filename = path
        raise


def is_used_beside(fd: int, path: str, access: Access) -> bool:
    """Return whether a file that is held is in use by another face, as `inuse.is_used_by_another_face`.

    Raises: OSError.
    """
    opened = reopen(fd, path, write=False)  # by O_PATH a loop device does not tell its file
    try:
        return inuse.is_used_by_another_face(opened, access)
    finally:
        os.close(opened)


def why_in_use(fd: int, path: str, access: Access, *, is_claimed: bool, with_names: bool) -> InUse:
    """Return the error for a file that is held, which somebody else claims or has locked. Raises: OSError."""
    naming = inuse.Naming(with_names)
    if is_claimed:
        return naming.claimed(fd, path)
    opened = reopen(fd, path, write=False)
    try:
        return naming.locked(opened, path, access)
    finally:
        os.close(opened)


def resolve(path: str) -> str:
    """Return the directory of a file with all links followed; for a name that ends with a slash, the name's own."""
    return os.path.realpath(os.path.dirname(path) or ".")  # noqa: PTH120 - pathlib would alter it
