"""Requests and replies of an NBD connection after its handshake.

Must not carry out a request.

Source: NetworkBlockDevice/nbd doc/proto.md, "Transmission".
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from xenbackend.nbd.abi import (
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    ERROR_ENOTSUP,
    ERRORS,
    MAX_BLOCK,
    MIN_BLOCK,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Export,
    NbdError,
)


class Command(NamedTuple):
    """A client's request; on the wire, the data of a write follow it."""

    kind: int
    flags: int
    cookie: int
    offset: int  # bytes
    length: int  # bytes

    @property
    def payload(self) -> int:
        """The number of bytes that follow the request."""
        return self.length if self.kind == CMD_WRITE else 0

    @property
    def must_be_durable(self) -> bool:
        """Whether this is a write or trim that may be answered only once it is on the medium."""
        return bool(self.flags & CMD_FLAG_FUA) and self.kind in (CMD_WRITE, CMD_TRIM)


def parse_command(received: bytearray) -> Command:
    """Return the request at the front of `received`, which has at least REQUEST.size bytes.

    Raises: NbdError if there is no request, and for a write that is longer than MAX_BLOCK.
    """
    magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(received)
    if magic != REQUEST_MAGIC:
        raise NbdError(f"a request that begins with {magic:#x}")
    command = Command(kind, flags, cookie, offset, length)
    if command.payload > MAX_BLOCK:
        raise NbdError(f"a write of {length} bytes, more than {MAX_BLOCK}")
    return command


def error_in(command: Command, export: Export) -> int:
    """Return the protocol's error number for a request that is not valid for this export, or 0."""
    if command.kind not in (CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM):
        return errno.EINVAL
    if command.flags & ~CMD_FLAG_FUA or (command.flags and not (export.can_flush and not export.read_only)):
        return errno.EINVAL
    if command.kind == CMD_DISC:
        return 0
    if command.kind == CMD_FLUSH:
        return 0 if export.can_flush and not export.read_only else errno.EINVAL
    if command.kind != CMD_READ and export.read_only:
        return errno.EPERM
    if command.kind == CMD_TRIM and not export.can_trim:
        return errno.EINVAL
    if command.kind == CMD_READ and command.length > MAX_BLOCK:
        return errno.EOVERFLOW
    if (command.offset | command.length) % MIN_BLOCK:
        return errno.EINVAL
    if command.offset + command.length > export.size:
        return errno.ENOSPC if command.kind == CMD_WRITE else errno.EINVAL
    return 0


def error_of(status: int) -> int:
    """Return the protocol's error number for an errno."""
    if status == errno.EOPNOTSUPP:
        return ERROR_ENOTSUP
    return status if status in ERRORS else errno.EIO


def reply(error: int, cookie: int) -> bytes:
    """Return the head of a simple reply; the data of a successful read have to follow it."""
    return REPLY.pack(REPLY_MAGIC, error, cookie)
