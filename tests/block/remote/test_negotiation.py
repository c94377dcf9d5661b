"""Tests of `xenbackend.block.remote.negotiation`: servers that never complete the handshake.

tests/block/drivers/test_nbd.py has servers that do, and programs that are not NBD servers.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest

from tests.certificates import Authority
from tests.helpers_block import Machine
from tests.nbd_server import ACK, MULTI_CONN, OPTION_REPLY, Export, Server, take
from xenbackend.block.remote import negotiation
from xenbackend.block.servers import Endpoint
from xenbackend.errors import DriverError
from xenbackend.opener import connecting

GREETING = b"NBDMAGICIHAVEOPT" + pack(">H", 3)
TOO_LONG = "the server has not done the handshake"


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Return a server of zeros."""
    with Server(tmp_path / "nbd.sock", Export(bytearray(1 << 20))) as server:
        yield server


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negotiation, "HANDSHAKE_S", 0.5)


@pytest.mark.parametrize("way", ["plain", "tls"])
def test_a_server_that_drips_is_given_up(machine: Machine, server: Server, tmp_path: Path, way: str) -> None:
    """The time limit is for the whole handshake, TLS included, so a server that only drips bytes is given up."""
    more = ""
    if way == "tls":
        more = f",certificates={Authority(tmp_path / 'ours').client('nobody', shows_itself=False)}"

    def drip(near: socket.socket) -> bool:
        said = GREETING
        if way == "tls":
            near.sendall(GREETING)
            take(near, 4 + 16)
            near.sendall(pack(">QIII", OPTION_REPLY, 5, ACK, 0))
            take(near, 5)  # TLS begins
            said = b"\x16\x03\x03\x40\x00" + bytes(12)
        for byte in said[:-1]:
            near.sendall(bytes([byte]))
            server.go.wait(0.2)
        return True

    server.greet = drip
    with pytest.raises(DriverError, match=TOO_LONG):
        machine.open(f"nbd:unix:{server.path}{more}")


def test_several_connections_have_no_more_time_than_one(machine: Machine, server: Server) -> None:
    """All handshakes of an opening share one time limit, because a worker that takes longer counts as dead."""
    server.export.flags |= MULTI_CONN
    server.greet = lambda _: server.go.wait(0.2)
    with pytest.raises(DriverError, match=TOO_LONG):
        machine.open(f"nbd:unix:{server.path},connections=8")


def test_what_comes_before_a_handshake_takes_none_of_its_time(
    machine: Machine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the end of a former connection and for `drain`, up to 40 s, does not count against the limit."""
    server.export.flags |= MULTI_CONN
    connect = connecting.connect

    def slowly(endpoint: Endpoint) -> socket.socket:
        server.go.wait(0.6)
        return connect(endpoint)

    monkeypatch.setattr(connecting, "connect", slowly)
    machine.open(f"nbd:unix:{server.path},connections=2").close()


def test_a_server_that_never_stops_is_given_up(machine: Machine, server: Server) -> None:
    """A server that sends replies without end is given up."""

    def talk(near: socket.socket) -> bool:
        near.sendall(GREETING)
        take(near, 4 + 16)
        while True:  # until the client hangs up
            near.sendall(pack(">QIII", OPTION_REPLY, 8, 3, 8) + bytes(8))

    server.greet = talk
    with pytest.raises(DriverError, match="does not speak NBD"):
        machine.open(f"nbd:unix:{server.path}")
