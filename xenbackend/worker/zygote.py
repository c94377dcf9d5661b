"""The process that workers and openers are forked from: it has imported all that they may need, and opened nothing.

Must not start a thread, open a device or a file, or import what a third party wrote: every worker would have it.

Over the socket given by number it says ``ready``; then come datagrams, each of which asks for processes by a letter for
each, ``w`` or ``o``, with the end of a socket for each. Its answer is ``pidfd``, with theirs, and ``born``, once they
are children of whoever adopts orphans; or ``failed``. It ends when the other end is closed.
"""

from __future__ import annotations

import gc
import os
import socket
import sys

from xenbackend.opener import main as opener_main
from xenbackend.protocol import datagrams
from xenbackend.worker import main as worker_main
from xenbackend.worker.preload import preload

WORKER, OPENER = "w", "o"
SERVE = {WORKER: worker_main.serve, OPENER: opener_main.serve}
_MOST = 2  # processes at once


def wait_for_birth(channel: socket.socket) -> tuple[str, socket.socket] | None:
    """Fork processes at each request, and return what one is and its socket there; None here, in the end."""
    channel.send(b"ready")
    while True:
        _, fds, _ = receive(channel, 16, 1)
        if not fds:
            return None
        kinds = datagram.decode()
        try:
            between = os.fork()
        except OSError:
            between = -1
        if between == 0:
            born = _bear(channel, len(fds))
            channel.close()
            for number, fd in enumerate(fds):
                if number != born:
                    os.close(fd)
            return kinds[born], socket.socket(fileno=fds[born])
        for fd in fds:
            os.close(fd)
        is_born = between > 0 and os.waitpid(between, 0)[1] == 0
        channel.send(b"born" if is_born else b"failed")


def _bear(channel: socket.socket, count: int) -> int:
    """Return in children of this process, each of which leads a session, and end this one.

    So they get another parent. Each gets its number, from 0 on.
    """
    children: list[int] = []
    try:
        near, far = os.pipe()
        for number in range(count):
            child = os.fork()
            if child == 0:
                os.setsid()
                os.close(near)
                os.close(far)
                return number
            children.append(child)
        os.close(far)
        os.read(near, 1)  # nothing comes: all lead their sessions, or have ended
        datagrams.send(channel, b"pidfd", [os.pidfd_open(child) for child in children])
    except OSError:
        os._exit(1)
    os._exit(0)


def main(arguments: list[str]) -> int:
    """Import everything for workers on the host that `arguments` name, and serve the socket given by number."""
    if len(arguments) != 4 or arguments[0] != "--host" or arguments[2] != "--socket" or not arguments[3].isdecimal():
        print("the zygote is started by the service, with --host and --socket", file=sys.stderr)
        return 2
    preload(arguments[1])
    channel = datagrams.inherited(int(arguments[3]))
    # What was made until here is looked at by no collection: it would write to memory that workers share.
    gc.collect()
    gc.freeze()
    try:
        born = wait_for_birth(channel)
    except (BrokenPipeError, ConnectionResetError):  # the service went away while we spoke
        return 1
    if born is None:
        return 0
    kind, far = born
    return SERVE[kind](far)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
