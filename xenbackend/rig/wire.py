"""Calls to the simulated hypervisor: one JSON datagram in each direction on a Unix socket, with descriptors beside it.

Must not know the meaning of a call.

    call    {"call": name, argument: value, …}
    answer  {"result": {…}}  or  {"errno": number}
"""

from __future__ import annotations

import json
import socket
from array import array
from pathlib import Path
from typing import Any

from xenbackend.errors import KernelError

SOCKET = "xen.sock"  # in the rig's directory
MAX_MESSAGE = 256 * 1024  # bytes; a call that maps 16384 grefs fits
MAX_DESCRIPTORS = 4


def send(connection: socket.socket, message: dict[str, Any], descriptors: list[int]) -> None:
    """Send one message. Raises: OSError."""
    data = json.dumps(message).encode()
    if descriptors:
        socket.send_fds(connection, [data], descriptors)
    else:  # a worker behind walls may send no descriptors, and so not call sendmsg(2)
        connection.send(data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message with its descriptors; a message without keys means that the other end has closed.

    Raises: OSError; ValueError if it is not JSON.
    """
    descriptors = array("i")
    room = socket.CMSG_SPACE(MAX_DESCRIPTORS * descriptors.itemsize)
    # Not by socket.recv_fds, which ignores its flags in Python 3.11: our children would inherit the descriptors.
    data, ancillary, _, _ = connection.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    for _, _, content in ancillary:
        descriptors.frombytes(content)
    return (json.loads(data) if data else {}), descriptors.tolist()


class Connection:
    """One user of the hypervisor, like an open device: what it holds is released when it closes or its process dies."""

    def __init__(self, directory: str | Path, fd: int = -1) -> None:
        """Connect to the rig in `directory`, or use the descriptor `fd`, which it owns then. Raises: KernelError."""
        if fd >= 0:
            self._socket = socket.socket(fileno=fd)
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
        try:
            self._socket.connect(str(Path(directory) / SOCKET))
        except OSError as error:
            self._socket.close()
            raise KernelError(f"connecting to the rig in {directory}", error.errno or 0) from error

    def call(self, name: str, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
        """Make one call; return its result and the descriptors that came with it. Raises: KernelError."""
        try:
            send(self._socket, {"call": name, **arguments}, [])
            answer, descriptors = receive(self._socket)
        except OSError as error:
            raise KernelError(f"the rig's {name}", error.errno or 0) from error
        if "result" not in answer:
            raise KernelError(f"the rig's {name}", answer.get("errno", 104))
        return answer["result"], descriptors

    def detach(self) -> int:
        """Return its descriptor, which belongs to the caller from now on."""
        return self._socket.detach()

    def close(self) -> None:
        """Close it, which releases everything that it holds, unless another copy of its descriptor is open."""
        self._socket.close()
