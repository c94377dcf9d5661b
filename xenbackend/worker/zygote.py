"""The process that workers are forked from: it has imported all that a worker may need, and opened nothing.

Must not start a thread, open a device or a file, or import what a third party wrote: every worker would have it.

Over the socket given by number it says ``ready``; then come datagrams ``fork``, each with a worker's end of a socket.
Its answer is ``pidfd``, with the worker's, and ``born``, once the worker is a child of whoever adopts orphans; or
``failed``. It ends when the other end is closed.
"""

from __future__ import annotations

import gc
import os
import socket
import sys

from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.kernel.ports import load_host
from xenbackend.worker import io_queue  # noqa: F401 - whoever opens an image for I/O imports it then
from xenbackend.worker.main import serve


def wait_for_birth(channel: socket.socket) -> socket.socket | None:
    """Fork a worker at each request, and return its socket there; None here, once nobody can ask any more."""
    channel.send(b"ready")
    while True:
        _, fds, _, _ = socket.recv_fds(channel, 16, 1)
        if not fds:
            return None
        far = socket.socket(fileno=fds[0])
        try:
            between = os.fork()
        except OSError:
            between = -1
        if between == 0:
            _bear(channel)
            channel.close()
            return far
        far.close()
        is_born = between > 0 and os.waitpid(between, 0)[1] == 0
        channel.send(b"born" if is_born else b"failed")


def _bear(channel: socket.socket) -> None:
    """Return in a child of this process, which leads a session, and end this one: so the child gets another parent."""
    try:
        near, far = os.pipe()
        child = os.fork()
        if child:
            os.close(far)
            os.read(near, 1)  # nothing comes: it leads its session, or has ended
            socket.send_fds(channel, [b"pidfd"], [os.pidfd_open(child)])
    except OSError:
        os._exit(1)
    if child:
        os._exit(0)
    os.setsid()
    os.close(near)
    os.close(far)


def main(arguments: list[str]) -> int:
    """Import everything for workers on the host that `arguments` name, and serve the socket given by number."""
    if len(arguments) != 4 or arguments[0] != "--host" or arguments[2] != "--socket" or not arguments[3].isdecimal():
        print("the zygote is started by the service, with --host and --socket", file=sys.stderr)
        return 2
    load_host(arguments[1])
    for name in BUILT_IN:
        find_driver(name)
    channel = socket.socket(fileno=int(arguments[3]))
    # What was made until here is looked at by no collection: it would write to memory that workers share.
    gc.collect()
    gc.freeze()
    try:
        far = wait_for_birth(channel)
    except (BrokenPipeError, ConnectionResetError):  # the service went away while we spoke
        return 1
    return serve(far) if far else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
