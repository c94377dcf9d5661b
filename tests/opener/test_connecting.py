"""Tests of `xenbackend.opener.connecting`: new connections, and former connections that are drained first."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError
from xenbackend.opener import connecting
from xenbackend.opener.connecting import Connections, End, connect, drain
from xenbackend.opener.rules import Server
from xenbackend.protocol import opening
from xenbackend.protocol.jobs import Job, KeptConnection
from xenbackend.protocol.opening import Connected, ConnectTo, Undrained


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Return a socket that listens."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "sock"))
        made.listen()
        yield made


class Said:
    """What an opener has told its supervisor."""

    def __init__(self) -> None:
        self.found: list[opening.Found] = []
        self.refusal = ""

    def __call__(self, found: opening.Found, _fds: Sequence[int]) -> str:
        """Record it."""
        self.found.append(found)
        return self.refusal


def kept(*places: int, is_broken: bool = False) -> tuple[Connections, list[socket.socket]]:
    """Return the connections of a job, and the servers' ends of them."""
    pairs = [socket.socketpair() for _ in places]
    job = Job("vbd/5/51712", [], False, connections=[KeptConnection("s", place, is_broken) for place in places])
    return Connections(job, [near.detach() for near, _ in pairs]), [far for _, far in pairs]


def ask(place: int = 0, after: After = After.NOTHING) -> ConnectTo:
    """Return a question for a connection."""
    return ConnectTo("s", place, after.value, keeps=True)


def make(
    connections: Connections, question: ConnectTo, listener: socket.socket, said: Said, drain_s: float = 0
) -> None:
    """Connect, and close the socket."""
    socket.socket(fileno=connections.connect(question, Server(Endpoint(listener.getsockname()), drain_s), said)).close()


def test_a_death_ends_all_former_connections(listener: socket.socket) -> None:
    """After a worker's death all its connections are shut down at once, read to their ends, and then no longer kept."""
    connections, fars = kept(0, 1)
    said = Said()
    seen: list[bytes] = []

    def end() -> None:
        for far in reversed(fars):  # the second one first
            far.sendall(b"a reply that nobody wants")
            seen.append(far.recv(1))
            far.close()

    thread = threading.Thread(target=end)
    thread.start()
    make(connections, ask(after=After.DEATH), listener, said)
    thread.join(20)
    assert [b"", b""] == seen
    assert [Connected("s", 0, is_alone=True)] == said.found
    connections.close()


def test_a_loss_ends_its_own_connection_alone(listener: socket.socket) -> None:
    """A lost connection is replaced, while those of other places go on."""
    connections, (one, other) = kept(0, 1)
    one.close()
    said = Said()
    make(connections, ask(after=After.LOSS), listener, said)
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.recv(1)
    assert [Connected("s", 0, is_alone=False)] == said.found
    other.close()
    connections.close()


def test_no_end_is_no_connection(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a server does not end a former connection, no new one is made, and that is reported."""
    monkeypatch.setattr(connecting, "DRAIN_S", 0.05)
    connections, [far] = kept(0)
    said = Said()
    with pytest.raises(DriverError, match="resume") as caught:
        make(connections, ask(after=After.DEATH), listener, said)
    assert errno.ETIMEDOUT == caught.value.errno
    far.close()
    make(connections, ask(after=After.DEATH), listener, said)  # the first one was read to its end
    assert [Undrained("s", 0, is_broken=False), Connected("s", 0, is_alone=True)] == said.found
    connections.close()


def test_a_server_that_sends_on_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draining stops when its time is over, however much there is to read; the next try continues."""
    monkeypatch.setattr(connecting, "_ROOM", 1)
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"xx")
        far.close()
        ends = [drain(near, time.monotonic() - 1) for _ in range(3)]

    assert [End.LASTS, End.LASTS, End.ENDED] == ends


@pytest.mark.parametrize("is_kept", [True, False], ids=["an earlier opener", "this one"])
def test_what_the_network_broke_has_no_end_to_see(listener: socket.socket, *, is_kept: bool) -> None:
    """A connection that the network broke looks ended although the server may still use it: only an administrator can
    say that it is over.
    """
    connections, [far] = kept(0, is_broken=is_kept)
    far.close()
    said = Said()
    for after in [After.LOSS if is_kept else After.BREACH, After.LOSS, After.DEATH]:
        with pytest.raises(DriverError, match="broke off without a proper end"):
            make(connections, ask(after=after), listener, said)
    assert [Undrained("s", 0, is_broken=True)] * 3 == said.found
    connections.close()


def test_a_server_that_goes_on_after_the_end_is_given_time(listener: socket.socket) -> None:
    """After the end of a former connection, `drain` passes before the next one is made; without a former one there is
    no wait.
    """
    connections, [far] = kept(0)
    far.close()
    began = time.monotonic()
    make(connections, ask(after=After.DEATH), listener, Said(), 0.3)
    between = time.monotonic()
    connections.close()
    fresh, _ = kept()
    make(fresh, ask(after=After.DEATH), listener, Said(), 60)
    assert 0.3 <= between - began
    assert time.monotonic() - between < 30
    fresh.close()


def test_a_connection_that_is_not_kept_is_not_had(listener: socket.socket) -> None:
    """If the supervisor refuses to keep a socket, the worker does not get it."""
    connections, _ = kept()
    said = Said()
    said.refusal = "no room"
    with pytest.raises(DriverError, match="no room"):
        make(connections, ask(), listener, said)
    near, _ = listener.accept()
    with closing(near):
        assert b"" == near.recv(1)
    connections.close()


def test_a_reset_is_an_end() -> None:
    """A connection that the server closes with unread data counts as ended."""
    near, far = socket.socketpair()
    near.sendall(b"unread")
    far.close()
    with closing(near):
        assert End.ENDED is drain(near, time.monotonic() + 5)


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        (Endpoint(path="/nonexistent/sock"), "No such file"),
        (Endpoint(host="127.0.0.1", port=1), "Connection refused"),
        (Endpoint(host="no.such.host.invalid", port=1), "cannot be found"),
    ],
)
def test_who_cannot_be_reached_is_named(endpoint: Endpoint, why: str) -> None:
    """The errors for a path, a port and a name that lead nowhere differ, and name the server."""
    with pytest.raises(DriverError, match=why) as caught:
        connect(endpoint)
    assert str(endpoint) in caught.value.problem


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_hosts_are_connected_to(family: int, host: str) -> None:
    """IPv4 and IPv6 addresses can be connected to, and small writes are sent at once."""
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip("this host has no such addresses")
        listener.listen()
        with closing(connect(Endpoint(host=host, port=listener.getsockname()[1]))) as near:
            assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert near.gettimeout() is None
