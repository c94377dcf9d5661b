"""Makes the socket on which a worker serves a device model; the supervisor removes it.

Must not accept a connection.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

BACKLOG = 8


def listen(path: str) -> int:
    """Return a socket that listens at `path` for our own user only, in the place of what was there.

    Its directory is made if it is missing. Raises: OSError, about `path`.
    """
    place = Path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        former = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(former)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno:  # errors of Python itself have none
            error.filename = error.filename or path
        raise
    return listener.detach()
