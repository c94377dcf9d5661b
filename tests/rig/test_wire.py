"""Messages to the simulated hypervisor."""

from __future__ import annotations

import os
import socket

import pytest

from xenbackend.errors import KernelError
from xenbackend.rig import wire
from xenbackend.rig.xen import Xen


@pytest.fixture
def pair():
    """Two ends of a connection."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def test_descriptors_travel(pair) -> None:
    """A descriptor arrives with its message, and is not inherited across exec."""
    fd = os.memfd_create("travels")
    wire.send(pair[0], {"a": 1}, [fd])
    message, (copy,) = wire.receive(pair[1])

    assert {"a": 1} == message
    assert os.path.samestat(os.fstat(fd), os.fstat(copy))
    assert not os.get_inheritable(copy)
    os.close(fd)
    os.close(copy)


def test_closed_end_is_an_empty_message(pair) -> None:
    """When the other end is closed, a message without keys is read."""
    pair[0].close()

    assert ({}, []) == wire.receive(pair[1])


def test_largest_call_fits(xen: Xen) -> None:
    """A call with every gref of a table is answered by the hypervisor, not refused by the socket."""
    connection = wire.Connection(xen.directory)
    with pytest.raises(KernelError, match="No such process"):
        connection.call("map", domid=5, grefs=list(range(16384)), writable=True)
    connection.close()


def test_no_rig_is_an_error(tmp_path) -> None:
    """A directory without a rig is refused with a sentence that names it."""
    with pytest.raises(KernelError, match=str(tmp_path)):
        wire.Connection(tmp_path)
