"""Descriptors that come with a datagram."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from xenbackend.protocol.datagrams import inherited, receive

SOURCE = Path(__file__).parents[2] / "xenbackend"


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a socket for datagrams."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_no_program_inherits_what_came(pair: tuple[socket.socket, socket.socket]) -> None:
    """A descriptor that was received is closed at exec, whatever the sender's own flags are."""
    near, far = pair
    sent = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(sent, True)
    socket.send_fds(far, [b"x"], [sent, sent])

    datagram, fds, is_whole = receive(near, 16, 2)

    assert (b"x", 2, True) == (datagram, len(fds), is_whole)
    assert [False, False] == [os.get_inheritable(fd) for fd in fds]
    for fd in (sent, *fds):
        os.close(fd)
    near.close()
    far.close()


@pytest.mark.parametrize(("size", "most"), [(2, 8), (16, 1)], ids=["long", "many descriptors"])
def test_what_was_cut_is_said(pair: tuple[socket.socket, socket.socket], size: int, most: int) -> None:
    """A datagram that is too long, or has too many descriptors, is reported as not whole."""
    near, far = pair
    socket.send_fds(far, [b"xyz"], [far.fileno()] * 3)

    datagram, fds, is_whole = receive(near, size, most)

    assert (b"xyz"[:size], False) == (datagram, is_whole)
    for fd in fds:
        os.close(fd)
    near.close()
    far.close()


def test_no_program_inherits_what_we_inherited(pair: tuple[socket.socket, socket.socket]) -> None:
    """A socket that a process was started with is closed at its own later execs."""
    near, far = pair
    near.set_inheritable(True)
    with inherited(near.detach()) as ours:
        ours.send(b"x")

        assert (False, b"x") == (ours.get_inheritable(), far.recv(1))
    far.close()


def test_nothing_takes_descriptors_by_the_way_that_children_inherit() -> None:
    """No code uses Python's `recv_fds`, which drops its flags: child programs would inherit the descriptors."""
    users = [str(file) for file in SOURCE.rglob("*.py") if "recv_fds(" in file.read_text()]

    assert [] == users
