"""Datagrams with descriptors beside them, on a SOCK_SEQPACKET socket.

Must not know what is said.

Python's own `send_fds` and `recv_fds` pass over the flags that they are given: the one would wait, and what the other
receives a program that is started would inherit.
"""

from __future__ import annotations

import socket
from array import array
from collections.abc import Sequence


def send(far: socket.socket, datagram: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """Send a datagram with descriptors, which stay ours. Raises: OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    far.sendmsg([datagram], rights, flags)


def receive(near: socket.socket, size: int, most: int) -> tuple[bytes, list[int], bool]:
    """Return a datagram, the descriptors beside it, which no program of ours inherits, and whether that is all of it.

    It is not where the datagram was longer than `size`, or came with more than `most` descriptors: those are closed.
    Raises: OSError.
    """
    fds = array("i")
    room = socket.CMSG_LEN(most * fds.itemsize)
    datagram, beside, flags, _ = near.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return datagram, list(fds), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
