"""Who may ask what on the control socket: root and the service's own user anything, a group what changes nothing.

Must not know more of a verb than whether it changes something, nor believe what a client says of itself: the kernel
tells who it is.

The group is a setting. Without one, nobody else can even connect.

Source: unix(7), SO_PEERCRED; asm-generic/socket.h, SO_PEERGROUPS (Linux 4.13).
"""

from __future__ import annotations

import grp
import os
import socket
from array import array
from contextlib import suppress
from pathlib import Path

from xenbackend.errors import ConfigError

CHANGES_NOTHING = frozenset({"ping", "status", "orders"})
MAX_READERS = 16  # of the group, connected at once, in places of their own
NOBODY = -1
_SO_PEERGROUPS = 59
_GROUPS_SIZE = 1024  # bytes, the most that Python reads: 256 groups


def group_number(name: str) -> int:
    """Return the number of a group, NOBODY for no name. Raises: ConfigError."""
    if not name:
        return NOBODY
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"group: there is no group {name!r}; make it with: groupadd --system {name}") from None


def is_ours(uid: int) -> bool:
    """Return whether a user may ask anything."""
    return uid in (0, os.geteuid())


def is_member(near: socket.socket, gid: int) -> bool:
    """Return whether the client was in a group when it connected, as the kernel says; NOBODY has no members."""
    if gid == NOBODY:
        return False
    try:
        groups = array("I", near.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE))
        own = array("i", near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[2]
    except (OSError, ValueError):  # the client is in more groups than that
        return False
    return gid == own or gid in groups


def open_to(path: Path, gid: int, *, directory: bool) -> None:
    """Let a group, and no other users, connect to a socket of ours; with `directory`, also enter its directory.

    Raises: ConfigError.
    """
    former = os.getegid()
    try:
        if gid != NOBODY:
            os.setegid(gid)  # a file's owner may give it to his own group without a capability
        _give(path, gid, 0o660 if gid != NOBODY else 0o600)
        if directory:
            _give(path.parent, gid, 0o710 if gid != NOBODY else 0o700)
    except OSError as error:
        raise ConfigError(f"{path}: cannot allow group {gid} to connect: {error.strerror}") from None
    finally:
        with suppress(OSError):
            os.setegid(former)


def _give(path: Path, gid: int, mode: int) -> None:
    path.chmod(mode & 0o700)  # first, so that the former group has no access meanwhile
    os.chown(path, -1, gid)
    path.chmod(mode)
