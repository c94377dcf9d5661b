"""The place of the control socket: who may listen there, and the socket that a former service has left.

Must not read or write a byte of what clients say.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from xenbackend.errors import ConfigError
from xenbackend.protocol.client import DEFAULT_SOCKET

BACKLOG = 256  # connections that wait to be accepted
OWN_DIRECTORY = Path(DEFAULT_SOCKET).parent


def check_place(path: str, inherited: int = -1) -> None:
    """See that a service can listen at `path`, where a former one may have left a socket that does.

    Raises: ConfigError.
    """
    if inherited >= 0:
        with socket.socket(fileno=os.dup(inherited)) as near:
            if _is_reached(near, Path(path)):
                return
    with listen(Path(path)):
        Path(path).unlink()


def check_free(path: str) -> None:
    """Make our own directory where it is missing, and raise ConfigError when there is anything but an unused socket."""
    if Path(path).parent == OWN_DIRECTORY:  # systemd makes it for the unit; whoever starts us by hand need not
        with suppress(OSError):
            OWN_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno is None:  # what Python itself refuses: a path that fits into no address
                raise ConfigError(f"{path}: cannot listen there: {error}") from None
            if Path(path).exists() and not Path(path).is_socket():
                raise ConfigError(f"{path}: cannot listen there: it is no socket") from None
            return
    raise ConfigError(f"{path}: another xenbackend service listens there already")


def take_over(path: Path, inherited: int) -> socket.socket | None:
    """Return the inherited socket if it can still be reached at `path`: whoever has connected meanwhile is served."""
    if inherited < 0:
        return None
    near = socket.socket(fileno=inherited)
    if _is_reached(near, path):
        near.setblocking(False)
        return near
    near.close()
    return None


def _is_reached(near: socket.socket, path: Path) -> bool:
    return near.getsockname() == str(path) and path.is_socket()


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at `path`, in the place of one that nobody uses any more. Raises: ConfigError."""
    check_free(str(path))
    near = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    former = os.umask(0o177)  # the socket is born with mode 0600
    try:
        path.unlink(missing_ok=True)
        near.bind(str(path))
    except OSError as error:
        near.close()
        hint = f"; make the directory {path.parent}" if error.errno == errno.ENOENT else ""
        raise ConfigError(f"{path}: cannot listen: {error.strerror or error}{hint}") from None
    finally:
        os.umask(former)
    near.listen(BACKLOG)
    return near
