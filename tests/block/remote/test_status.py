"""Tests of `xenbackend.block.remote.status`: endless answers. tests/block/drivers/test_nbd.py has correct ones."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from itertools import repeat
from struct import pack

import pytest

from xenbackend.block.remote.lost import Lost
from xenbackend.block.remote.status import ask
from xenbackend.nbd.abi import CHUNK_BLOCK_STATUS, CHUNK_DONE, STRUCTURED_MAGIC, NbdError

SIZE = 1 << 20


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return a non-blocking socket, and a server's end of it."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        yield near, far


def chunk(body: bytes = b"", flags: int = 0) -> bytes:
    """Return a chunk of block status."""
    return pack(">IHHQI", STRUCTURED_MAGIC, flags, CHUNK_BLOCK_STATUS, 0, len(body)) + body


def test_block_status_that_never_comes_ends_the_connection(ends: tuple[socket.socket, socket.socket]) -> None:
    """The number of chunks is limited, so a server that never sends the last one is given up."""
    near, far = ends
    talking = threading.Thread(target=lambda: all(_can_send(far, chunk()) for _ in repeat(None)))
    talking.start()
    with pytest.raises(NbdError, match="chunks"):
        list(ask(near, 7, 0, SIZE, 10))
    near.close()
    talking.join(10)
    assert not talking.is_alive()


def test_block_status_that_drips_is_given_up(ends: tuple[socket.socket, socket.socket]) -> None:
    """The time limit is for the whole answer, not for each byte."""
    near, far = ends
    is_over = threading.Event()

    def drip() -> None:
        for byte in chunk(pack(">III", 7, SIZE, 0), CHUNK_DONE)[:-1]:
            if not _can_send(far, bytes([byte])) or is_over.wait(0.1):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(Lost, match="has not answered within"):
        list(ask(near, 7, 0, SIZE, 0.5))
    is_over.set()
    dripping.join(10)


def _can_send(far: socket.socket, data: bytes) -> bool:
    try:
        far.sendall(data)
    except OSError:
        return False
    return True
