"""The certificates by which a worker speaks TLS, read from a directory for a worker that can open no file.

Must not judge what is in them: OpenSSL does, where they are used.

The files are called as QEMU and libnbd call them, so that one directory serves all.
"""

from __future__ import annotations

import errno
import os
import stat

from xenbackend.block.servers import AUTHORITIES, CERTIFICATE, KEY
from xenbackend.errors import DriverError, printable

MAX_FILE = 64 << 10  # bytes of all of them together, so that they fit into a message


def read_certificates(directory: str) -> dict[str, str]:
    """Return what is in the files by their names: the authorities, and our own certificate with its key, if any.

    Raises: DriverError, naming the file; OSError.
    """
    found = {AUTHORITIES: _text(directory, AUTHORITIES)}
    for name in (CERTIFICATE, KEY):
        try:
            found[name] = _text(directory, name)
        except FileNotFoundError:
            continue
    if (CERTIFICATE in found) != (KEY in found):
        problem = f"{printable(directory)} has one of {CERTIFICATE} and {KEY}; a client that shows who it is needs both"
        raise DriverError(problem, path=directory, errno=errno.ENOENT)
    if sum(map(len, found.values())) > MAX_FILE:
        problem = f"the certificates in {printable(directory)} have more than {MAX_FILE} bytes together"
        raise DriverError(problem, path=directory, errno=errno.EFBIG)
    return found


def _text(directory: str, name: str) -> str:
    path = os.path.join(directory, name)  # noqa: PTH118 - the name as it is
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DriverError(f"{printable(path)} is not a file", path=path)
        data = file.read(MAX_FILE + 1)
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise DriverError(f"{printable(path)} is not a PEM file, which is text", path=path) from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # it would wait for whoever writes to a pipe
