"""Reads the certificates that a worker needs for TLS from a directory, as a worker can open no file.

Must not judge their content: OpenSSL does that where they are used.

The files have the names that QEMU and libnbd give them, so that one directory serves all.
"""

from __future__ import annotations

import errno
import os
import stat

from xenbackend.block.servers import AUTHORITIES, CERTIFICATE, KEY
from xenbackend.errors import DriverError, printable

MAX_FILE = 64 << 10  # bytes of all files together, so that they fit into a message


def read_certificates(directory: str) -> dict[str, str]:
    """Return the contents of the files by name: the authorities, and our own certificate with its key, if any.

    Raises: DriverError, naming the file; OSError.
    """
    found = {AUTHORITIES: _text(directory, AUTHORITIES)}
    for name in (CERTIFICATE, KEY):
        try:
            found[name] = _text(directory, name)
        except FileNotFoundError:
            continue
    if (CERTIFICATE in found) != (KEY in found):
        problem = (
            f"{printable(directory)} has only one of {CERTIFICATE} and {KEY}; a client needs both to identify itself"
        )
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
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # else opening a pipe would wait for a writer
