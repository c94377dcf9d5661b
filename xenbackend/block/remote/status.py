"""Requests for block status: which ranges of an export read as zeros.

Must not be used in a worker's loop: it waits for the reply.

Source: NetworkBlockDevice/nbd doc/proto.md, "Block status".
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

from xenbackend.block.remote.deadline import Deadline
from xenbackend.block.remote.lost import Lost, errno_of, lost
from xenbackend.block.remote.tls import TlsSocket
from xenbackend.nbd.abi import (
    CHUNK_BLOCK_STATUS,
    CHUNK_DONE,
    CHUNK_ERROR,
    CHUNK_ERROR_HEAD,
    CMD_BLOCK_STATUS,
    EXTENT,
    REQUEST,
    REQUEST_MAGIC,
    STRUCTURED,
    STRUCTURED_MAGIC,
    NbdError,
)

Stream = socket.socket | TlsSocket
_MOST = 1 << 20  # bytes of a chunk
_MAX_CHUNKS = 64  # of a reply; there should be one for each context that was negotiated, and that is one


def ask(near: Stream, context: int, offset: int, length: int, timeout_s: float) -> Iterator[tuple[int, int]]:
    """Yield the length and flags of ranges from `offset` on, at least one; nothing is in flight on `near`.

    Raises: Lost, NbdError; OSError if the server refuses.
    """
    deadline = Deadline(timeout_s)
    try:
        near.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_BLOCK_STATUS, 0, offset, length))
        found = _answer(near, context.to_bytes(4, "big"), deadline)
    except TimeoutError as error:
        raise Lost(f"the server has not answered within {timeout_s:.0f} s", is_broken=True) from error
    except ConnectionError as error:
        raise lost(error) from error
    if not found or len(found) % EXTENT.size:
        raise NbdError("block status without ranges")
    yield from EXTENT.iter_unpack(found)


def _answer(near: Stream, context: bytes, deadline: Deadline) -> bytes:
    """Receive a reply, and return its packed ranges for one context."""
    found = b""
    for _ in range(_MAX_CHUNKS):
        magic, flags, kind, _, size = STRUCTURED.unpack(_take(near, STRUCTURED.size, deadline))
        if magic != STRUCTURED_MAGIC or size > _MOST:
            raise NbdError(f"a reply to block status that begins with {magic:#x}")
        body = _take(near, size, deadline)
        if kind & CHUNK_ERROR and size >= CHUNK_ERROR_HEAD.size:
            code = CHUNK_ERROR_HEAD.unpack_from(body)[0]
            raise OSError(errno_of(code), "the server refuses to tell its block status")
        if kind == CHUNK_BLOCK_STATUS and body[:4] == context:
            found = body[4:]
        if flags & CHUNK_DONE:
            return found
    raise NbdError(f"more than {_MAX_CHUNKS} chunks in reply to one question for block status")


def _take(near: Stream, size: int, deadline: Deadline) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = deadline.do(near, partial(near.recv, size - len(received)))
        if not piece:
            raise Lost("the server has closed the connection")
        received += piece
    return bytes(received)
