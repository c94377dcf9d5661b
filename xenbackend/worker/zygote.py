"""The process that workers and openers are forked from: it has imported all that they may need, and opened nothing.

Must not start a thread, open a device or a file, or import what a third party wrote: every worker would have it. All
that it holds for its workers are the empty namespaces of their walls.

Over the socket given by number it says ``ready``; then come datagrams ``fork``, each with a worker's end of a socket,
and the words of third parties' drivers behind it: ``fork xor``.
Its answer is ``pidfd``, with the worker's, and ``born``, once the worker is a child of whoever adopts orphans; or
``failed``. It ends when the other end is closed.
"""

from __future__ import annotations

import gc
import os
import socket
import sys

from xenbackend.walls.raising import Walls
from xenbackend.worker import birth, io_queue  # noqa: F401 - whoever opens an image for I/O imports the queues then
from xenbackend.worker.main import serve

_MOST = 4096  # bytes of a request: words of a chain


def wait_for_birth(channel: socket.socket, walls: Walls) -> tuple[socket.socket, birth.Birth] | None:
    """Fork a worker at each request, and return its socket and what it is told there; None here, once nobody asks."""
    channel.send(b"ready")
    while True:
        asked, fds, _, _ = socket.recv_fds(channel, _MOST, 1)
        if not fds:
            return None
        kinds = datagram.decode()
        try:
            between = os.fork()
        except OSError:
            between = -1
        if between == 0:
            pid, why_not_alone = _bear(channel, walls)
            channel.close()
            return far, birth.Birth(pid, birth.words(asked.decode().partition(" ")[2]), why_not_alone)
        far.close()
        is_born = between > 0 and os.waitpid(between, 0)[1] == 0
        channel.send(b"born" if is_born else b"failed")


def _bear(channel: socket.socket, walls: Walls) -> tuple[int, str]:
    """Return in a child of this process, which leads a session, and end this one: so the child gets another parent.

    Returns: the child's number, as the host knows it, and why it sees other processes, empty where it does not.
    """
    why_not_alone = walls.number_anew()
    try:
        near, far = socket.socketpair()
        child = os.fork()
        if child:
            far.close()
            near.send(b"%d" % child)
            near.recv(1)  # nothing comes: it leads its session, or has ended
            socket.send_fds(channel, [b"pidfd"], [os.pidfd_open(child)])
    except OSError:
        os._exit(1)
    if child:
        os._exit(0)
    near.close()
    pid = int(far.recv(16))
    os.setsid()
    far.close()
    return pid, why_not_alone


def main(arguments: list[str]) -> int:
    """Import everything for workers on the host that `arguments` name, and serve the socket given by number."""
    given = birth.parse(arguments)
    if given is None or "host" not in given:
        print("the zygote is started by the service, with --host and --socket", file=sys.stderr)
        return 2
    walls = Walls(given.get("walls", "off"))
    birth.import_everything(given["host"])
    channel = socket.socket(fileno=int(given["socket"]))
    # What was made until here is looked at by no collection: it would write to memory that workers share.
    gc.collect()
    gc.freeze()
    try:
        born = wait_for_birth(channel, walls)
    except (BrokenPipeError, ConnectionResetError):  # the service went away while we spoke
        return 1
    return serve(born[0], walls, born[1]) if born else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
