"""The numbers and layouts of NBD, newstyle, for both sides, and the properties that a server tells about its export.

Must not hold behaviour. Everything is big-endian.

Source: NetworkBlockDevice/nbd doc/proto.md.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from struct import Struct

from xenbackend.errors import GuestError

# Handshake
NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2  # of the server and of the client alike
OPTION = Struct(">8sII")  # IHAVEOPT, option, length of its data
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT = 8, 10
OPTION_REPLY = Struct(">QIII")  # magic, option, type, length of its data
OPTION_REPLY_MAGIC = 0x3E889045565A9
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERROR = 1 << 31  # in the type of a reply that refuses; its data is a message
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = (REP_ERROR | number for number in (1, 2, 3))
REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_SHUTDOWN = (REP_ERROR | number for number in (5, 6, 7))
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
EXPORT_NAME_REPLY = Struct(">QH")  # size, transmission flags; ZEROES follow
ZEROES = bytes(124)

# Transmission
SEND_HAS_FLAGS, SEND_READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_MULTI_CONN = (1 << n for n in (0, 1, 2, 3, 5, 8))
REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
REQUEST_MAGIC = 0x25609513
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM = range(5)
CMD_BLOCK_STATUS = 7
CMD_FLAG_FUA = 1
REPLY = Struct(">IIQ")  # magic, error, cookie; the data of a read follow
REPLY_MAGIC = 0x67446698
STRUCTURED = Struct(">IHHQI")  # magic, flags, type, cookie (where REPLY has it), length of the data after it
STRUCTURED_MAGIC = 0x668E33EF
CHUNK_DONE = 1  # flag: the last chunk of its reply
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_ERROR = 1 << 15  # in the type of a chunk that says that the request failed
CHUNK_DATA_HEAD, CHUNK_HOLE_BODY, CHUNK_ERROR_HEAD = Struct(">Q"), Struct(">QI"), Struct(">IH")
ALLOCATION = b"base:allocation"  # the metadata context that block status uses
STATUS_ZERO = 2  # flag in this context: the range reads as zeros
EXTENT = Struct(">II")  # length, flags

# The protocol defines its own error numbers, which equal those of Linux. Any error that is not here is sent as EIO.
ERRORS = frozenset({0, errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW})
ERROR_ENOTSUP, ERROR_ESHUTDOWN = 95, 108

MIN_BLOCK = 512  # bytes; offsets and lengths are multiples of it
MAX_BLOCK = 32 << 20  # bytes of one read or write


class NbdError(GuestError):
    """The other side broke the protocol, so that the start of its next message is unknown: the connection ends."""


@dataclass(frozen=True, slots=True)
class Export:
    """The disk that is exported, under the empty name."""

    size: int  # bytes
    preferred_block: int = 4096  # bytes
    read_only: bool = False
    can_flush: bool = True
    can_trim: bool = False

    @property
    def flags(self) -> int:
        """The transmission flags."""
        flags = SEND_HAS_FLAGS | SEND_MULTI_CONN  # all connections use one chain: a flush on one counts for all
        if self.read_only:
            return flags | SEND_READ_ONLY
        return flags | (SEND_FLUSH | SEND_FUA) * self.can_flush | SEND_TRIM * self.can_trim
