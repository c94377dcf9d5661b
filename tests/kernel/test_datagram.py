"""Datagrams with descriptors beside them."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from tests.descriptors import open_descriptors
from xenbackend.kernel.datagram import receive, send

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Return both ends of a socket; nothing else is open in the end."""
    before = open_descriptors()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        yield near, far
    assert before == open_descriptors()


def test_descriptors_are_not_inherited(pair: Pair) -> None:
    """What comes beside a datagram is ours alone: a program that is started does not get it."""
    near, far = pair
    send(far, b"two", [0, 1])
    datagram, fds, is_whole = receive(near, 16, 2)
    flags = [fcntl.fcntl(fd, fcntl.F_GETFD) for fd in fds]
    for fd in fds:
        os.close(fd)

    assert (b"two", True) == (datagram, is_whole)
    assert [fcntl.FD_CLOEXEC] * 2 == flags


@pytest.mark.parametrize(("size", "most"), [(2, 2), (16, 1)])
def test_what_is_cut_off_is_told(pair: Pair, size: int, most: int) -> None:
    """A datagram that is too long, or with too many descriptors, is known as such, and nothing stays open."""
    near, far = pair
    send(far, b"long", [0, 1])
    _, fds, is_whole = receive(near, size, most)
    for fd in fds:
        os.close(fd)

    assert not is_whole
    assert len(fds) <= most
