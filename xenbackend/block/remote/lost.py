"""Why a connection to an NBD server was lost, and the errno for a server's error numbers.

Must not hold a socket.
"""

from __future__ import annotations

import errno

from xenbackend.block.request import AWAY
from xenbackend.nbd.abi import ERROR_ESHUTDOWN, ERRORS

_RESETS = (errno.ECONNRESET, errno.EPIPE)


class Lost(Exception):
    """The connection is unusable; `is_broken`: because of the network, and not because of the server."""

    def __init__(self, why: str, *, is_broken: bool = False) -> None:
        super().__init__(why)
        self.is_broken = is_broken


def errno_of(code: int) -> int:
    """Return the errno for an error number of the protocol."""
    if code == ERROR_ESHUTDOWN:
        return AWAY
    if code == errno.EOPNOTSUPP:
        return errno.EOPNOTSUPP
    return code if code in ERRORS and code else errno.EIO


def lost(error: OSError) -> Lost:
    """Return the loss of a connection that an error of its socket means."""
    if error.errno in _RESETS:
        return Lost("the server has reset the connection")
    return Lost(f"the connection broke: {error.strerror or error}", is_broken=True)
