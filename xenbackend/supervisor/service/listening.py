"""Opens the control socket: only one service may listen at a path, and a socket left by a former one is replaced.

Must not communicate with clients, nor let two services listen at one path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xenbackend.errors import ConfigError, XenbackendError, sentence_of, unwritable
from xenbackend.protocol.client import DEFAULT_SOCKET

BACKLOG = 256  # connections that wait to be accepted
PATIENCE_S = 10.0  # for the lock, which is held for milliseconds
_PAUSE_S = 0.01  # between two tries for it
_CREDENTIALS = 12  # bytes of struct ucred, unix(7)
OWN_DIRECTORY = Path(DEFAULT_SOCKET).parent


def check_place(path: str, inherited: int = -1) -> None:
    """Check that a service can listen at `path`, where a socket inherited from a former service may still listen.

    Raises: XenbackendError, a ConfigError if it is a mistake.
    """
    if inherited >= 0:
        with socket.socket(fileno=os.dup(inherited)) as near:
            if _is_reached(near, Path(path)):
                return
    with alone_at(Path(path)), _listen(Path(path)):
        Path(path).unlink()


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at `path`; replace one on which nobody listens any more. Raises: XenbackendError."""
    with alone_at(path):
        return _listen(path)


def take_over(path: Path, inherited: int) -> socket.socket | None:
    """Return the inherited socket if it is still the one at `path`, so that clients connected meanwhile are served."""
    if inherited < 0:
        return None
    near = socket.socket(fileno=inherited)
    if _is_reached(near, path):
        near.setblocking(False)
        return near
    near.close()
    return None


def identity_of(path: Path) -> tuple[int, int, int] | None:
    """Return what tells the file at `path` from others: device, inode and, as that is reused, time; None: no file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _is_reached(near: socket.socket, path: Path) -> bool:
    """Return whether clients that connect at `path` reach `near`, and not another service that has taken the path.

    The kernel tells for both sockets which process has begun to listen.
    """
    if near.getsockname() != str(path) or not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:  # somebody listens, for so many clients that it is hardly another service
            return True
        except OSError:
            return False
        return _listener(probe) == _listener(near)


def _listener(near: socket.socket) -> bytes:
    return near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS)


@contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Hold a lock beside `path`, without which no service listens there or removes a socket.

    Raises: ConfigError; XenbackendError, if a later attempt may succeed: the host is short of something, or the holder
    does not release it, such as a process that is stopped.

    It is needed because between bind and listen a socket looks like one that a dead service has left. OWN_DIRECTORY is
    created if it does not exist.
    """
    if path.parent == OWN_DIRECTORY:  # systemd creates it for the unit, but nobody does if we are started by hand
        with suppress(OSError):
            OWN_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    file = Path(f"{path}.lock")
    try:
        fd = _lock(file)
    except TimeoutError as error:
        raise XenbackendError(f"{path}: cannot listen: {error}") from None
    except OSError as error:
        raise _cannot_listen(path, error) from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(fd)


def _lock(file: Path) -> int:
    """Return a descriptor of a file that is locked while it has this name. Raises: TimeoutError, OSError."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not _is_locked(fd):
                if time.monotonic() >= give_up:
                    raise TimeoutError(
                        f"{_holder(fd)} has held the lock {file} for {PATIENCE_S:g} s; continue that process, or end it"
                    )
                time.sleep(_PAUSE_S)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), file.stat()):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its former holder has removed the file


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> str:
    """Return who has locked a file, for people: proc_locks(5)."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if place in words and words[1] == "FLOCK":
                return f"process {words[4]}"
    return "another process"


def _listen(path: Path) -> socket.socket:
    check_free(path, socket.SOCK_STREAM, "xenbackend service")
    near = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    former = os.umask(0o177)  # the socket is created with mode 0600
    try:
        path.unlink(missing_ok=True)
        near.bind(str(path))
        near.listen(BACKLOG)
    except OSError as error:
        near.close()
        raise _cannot_listen(path, error) from None
    finally:
        os.umask(former)
    return near


def check_free(path: Path, kind: socket.SocketKind, who: str) -> None:
    """Check that at `path` there is nothing, or a socket of this kind that no `who` uses. Raises: ConfigError."""
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:  # it listens, and its backlog is full
            pass
        except OSError as error:
            if error.errno is None:  # refused by Python itself: the path is too long for a socket's address
                raise ConfigError(f"{path}: cannot listen there: {error}") from None
            if path.exists() and not path.is_socket():
                raise ConfigError(f"{path}: cannot listen there: it is not a socket") from None
            return
    raise ConfigError(f"{path}: another {who} listens there already")


def _cannot_listen(path: Path, error: OSError) -> XenbackendError:
    if error.errno == errno.ENOENT:
        return ConfigError(f"{path}: cannot listen: {error.strerror}; make the directory {path.parent}")
    return unwritable(f"{path}: cannot listen: {sentence_of(error)}", error)
