"""NBD servers in dom0, as units that systemd starts again when they end.

Must not leave one behind, nor its socket.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.xen.tools.command import run, until

KINDS = ("nbdkit", "qemu-nbd")
_SOCKET = Path("/run/nbd-server.sock")
_UNIT = "nbd-server.service"


@contextmanager
def nbd_server(kind: str, image: Path) -> Iterator[str]:
    """Have one of `KINDS` serve a raw image, and return the layer that is its disk.

    How long the layer waits after a death is what its manual has for the server: not at all for nbdkit with one thread,
    which closes a connection once all is done, and the default for the other.
    """
    commands = {
        "nbdkit": ("nbdkit", "--foreground", "--threads=1", f"--unix={_SOCKET}", "file", image),
        "qemu-nbd": ("qemu-nbd", "--persistent", "--shared=2", "--format=raw", f"--socket={_SOCKET}", image),
    }
    properties = ("Restart=always", "StartLimitIntervalSec=0", f"ExecStartPre=/bin/rm -f {_SOCKET}")
    unit = (f"--unit={_UNIT}", *(f"--property={each}" for each in properties))
    run("systemd-run", "--quiet", "--collect", *unit, *commands[kind])
    try:
        until(f"{kind} listens", _listens)
        yield f"nbd:unix:{_SOCKET}{',drain=0s' if kind == 'nbdkit' else ''}"
    finally:
        run("systemctl", "stop", _UNIT)
        _SOCKET.unlink(missing_ok=True)


def _listens() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(_SOCKET)) == 0
