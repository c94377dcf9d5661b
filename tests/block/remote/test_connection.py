"""Tests of `xenbackend.block.remote.connection`: endless answers, sent byte by byte through a socket pair.

tests/block/drivers/test_nbd.py has servers that are good, slow and wrong.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from struct import pack

import pytest

from tests.helpers_block import content, read
from xenbackend.block.remote.connection import MAX_ERRORS, Connection
from xenbackend.block.remote.lost import Lost
from xenbackend.nbd.abi import CHUNK_DATA, CHUNK_DONE, CHUNK_ERROR, CHUNK_HOLE, CHUNK_NONE, STRUCTURED_MAGIC, NbdError
from xenbackend.nbd.client import Offer

SIZE = 1 << 20
ERROR = CHUNK_ERROR | 1


def chunk(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    """Return a chunk in reply to request 0."""
    return pack(">IHHQI", STRUCTURED_MAGIC, flags, kind, 0, len(body)) + body


def hole(offset: int, length: int) -> bytes:
    """Return a chunk that says that there are zeros."""
    return chunk(CHUNK_HOLE, pack(">QI", offset, length))


def failure(code: int) -> bytes:
    """Return a chunk that says that something failed."""
    return chunk(ERROR, pack(">IH", code, 0))


DATA = chunk(CHUNK_DATA, pack(">Q", 0) + b"x" * 512)
END = chunk(CHUNK_NONE, flags=CHUNK_DONE)


Ends = tuple[Connection, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Return a connection with structured replies, and its server's end."""
    near, far = socket.socketpair()
    connection = Connection(near, Offer(SIZE, 0, structured=True, context=7))
    with far:
        yield connection, far
    connection.close(in_order=False)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (hole(0, 0), "0 bytes"),
        (failure(5) * (MAX_ERRORS + 1), f"more than {MAX_ERRORS} errors"),
        (failure(5) + DATA * 2, "more data than"),
        (chunk(CHUNK_DATA, pack(">Q", 0)), "data of 8 bytes"),
        (chunk(CHUNK_NONE), "in reply to a READ"),
    ],
)
def test_an_answer_that_could_go_on_for_ever_ends_the_connection(ends: Ends, said: bytes, why: str) -> None:
    """Every chunk brings a read closer to its end or is counted, so a server cannot keep a worker busy without end."""
    connection, far = ends
    connection.submit([read(0, 512)])
    far.sendall(said)
    assert [] == connection.receive()
    assert isinstance(connection.failure, NbdError)
    assert why in str(connection.failure)


def test_a_read_that_failed_in_part(ends: Ends) -> None:
    """If both data and errors come, the first error counts. The next request is not affected."""
    connection, far = ends
    request, other = read(0, 1024), read(0, 512)
    connection.submit([request])
    far.sendall(failure(errno.ENOSPC) + DATA + failure(errno.EIO) + END)
    assert [request] == connection.receive()
    assert errno.ENOSPC == request.status
    connection.submit([other])
    far.sendall(DATA + END)
    assert [other] == connection.receive()
    assert (0, b"x" * 512) == (other.status, content(other))


def _fails(*_: object) -> int:
    """Return the one error that Linux reports of a failed network: later calls see an ordinary end."""
    raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")


def test_what_ended_a_connection_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the network fails while we send, the end that is received next is not the server's and proves nothing."""
    near, far = socket.socketpair()
    connection = Connection(near, Offer(SIZE, 0))
    monkeypatch.setattr(os, "writev", _fails)
    far.close()
    connection.submit([read(0, 512)])
    assert [] == connection.receive()
    assert isinstance(connection.failure, Lost)
    assert connection.failure.is_broken
    connection.close(in_order=False)
