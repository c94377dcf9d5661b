"""Sends and receives datagrams with descriptors beside them, for all our processes.

Must not know what a datagram says, nor let a program that we start inherit a received descriptor.
"""

from __future__ import annotations

import socket
from array import array
from collections.abc import Sequence


def inherited(number: int) -> socket.socket:
    """Return the socket that this process inherited by number; programs that this process starts do not inherit it."""
    near = socket.socket(fileno=number)
    near.set_inheritable(False)
    return near


def receive(near: socket.socket, size: int, most: int) -> tuple[bytes, list[int], bool]:
    """Return a datagram, the descriptors beside it, which no program inherits, and whether both are complete.

    They are not if the datagram was longer than `size`, or came with more than `most` descriptors; the surplus is
    dropped. Python's own `recv_fds` lacks the flag that keeps descriptors from being inherited. Raises: OSError.
    """
    fds = array("i")
    room = socket.CMSG_LEN(most * fds.itemsize)
    datagram, beside, flags, _ = near.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return datagram, list(fds), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def send(far: socket.socket, datagram: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """Send a datagram with descriptors, which stay ours. Raises: OSError.

    Python's own `send_fds` ignores its flags, and so would wait.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    far.sendmsg([datagram], rights, flags)
