"""Tests of `tests.chaos.link`: what the two ends of a connection see of each fault."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from random import Random
from threading import Event
from types import SimpleNamespace

import pytest

from tests.chaos import link
from tests.chaos.link import Fault, Link
from tests.until import until

MESSAGE = bytes(range(256)) * 64
PATIENCE_S = 20.0


class Ends:
    """A connection by a link: the worker's end, and the server's."""

    def __init__(self, link: Link, listener: socket.socket) -> None:
        self.link = link
        self.worker = socket.socket(socket.AF_UNIX)
        self.worker.connect(str(link.path))
        self.server, _ = listener.accept()
        for each in (self.worker, self.server):
            each.settimeout(PATIENCE_S)
        self.pass_on(self.worker, self.server)

    def pass_on(self, sender: socket.socket, receiver: socket.socket) -> None:
        """Check that a message comes through."""
        sender.sendall(MESSAGE)
        assert MESSAGE == receiver.recv(len(MESSAGE), socket.MSG_WAITALL)

    def fail(self, fault: Fault) -> None:
        """Have a fault."""
        self.link.fail(fault, Random(1))
        assert 1 == self.link.counts[fault]

    def close(self) -> None:
        """Close both ends."""
        self.worker.close()
        self.server.close()


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    """A connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "server"))
        listener.listen()
        with Link(tmp_path / "link", tmp_path / "server") as link, closing(Ends(link, listener)) as made:
            yield made


def test_what_passes_is_whole_and_in_order(ends: Ends) -> None:
    """Without a fault, bytes and ends come through in both directions."""
    ends.pass_on(ends.server, ends.worker)
    ends.worker.shutdown(socket.SHUT_WR)
    assert b"" == ends.server.recv(1)
    ends.pass_on(ends.server, ends.worker)
    ends.server.close()
    assert b"" == ends.worker.recv(1)


class Held:
    """Takes the place of the event by which a connection waits, and lets it wait until `go`."""

    def __init__(self) -> None:
        self.waits: SimpleQueue[float] = SimpleQueue()  # seconds
        self.go = Event()
        self.is_set = self.go.is_set
        self.set = self.go.set

    def wait(self, seconds: float) -> None:
        """Wait until `go`."""
        self.waits.put(seconds)
        self.go.wait(PATIENCE_S)


@pytest.mark.parametrize("fault", [Fault.STALL, Fault.DELAY])
def test_what_is_held_comes_later(ends: Ends, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """A link that stalls or delays holds what is sent, loses nothing, ends nothing, and is over by itself."""
    now, held = [10**9], Held()
    monkeypatch.setattr(link, "time", SimpleNamespace(monotonic_ns=lambda: now[0]))
    [lane] = ends.link._alive()
    monkeypatch.setattr(lane, "_is_over", held)
    ends.fail(fault)
    assert ends.link.has_fault(now[0])
    ends.worker.sendall(MESSAGE)
    assert 0 < held.waits.get(timeout=PATIENCE_S) <= link._LONGEST_S
    assert [] == select.select([ends.server], [], [], 0)[0]

    now[0] += int(link._LONGEST_S * 1e9)
    held.go.set()
    assert MESSAGE == ends.server.recv(len(MESSAGE), socket.MSG_WAITALL)
    assert not ends.link.has_fault(now[0])
    ends.pass_on(ends.server, ends.worker)
    ends.pass_on(ends.worker, ends.server)
    assert held.waits.empty()


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.CUT_REQUEST])
def test_the_server_learns_of_the_end_first(ends: Ends, fault: Fault) -> None:
    """The server gets a part at most, and then the end. The worker gets its end when the server has ended."""
    ends.fail(fault)
    ends.worker.sendall(MESSAGE)
    until(lambda: not ends.server.recv(1 << 16), "the server sees no end")
    ends.worker.setblocking(False)
    with pytest.raises(BlockingIOError):
        ends.worker.recv(1)
    ends.worker.settimeout(PATIENCE_S)
    ends.server.sendall(b"answer")
    assert b"answer" == ends.worker.recv(6, socket.MSG_WAITALL)
    ends.server.close()
    assert b"" == ends.worker.recv(1)


def test_an_answer_is_cut(ends: Ends) -> None:
    """The worker gets a part of an answer, and then the end, once the server has ended."""
    ends.fail(Fault.CUT_REPLY)
    ends.server.sendall(MESSAGE)
    assert b"" == ends.server.recv(1)
    ends.server.close()
    got = b""
    while piece := ends.worker.recv(1 << 16):
        got += piece
    assert len(got) < len(MESSAGE)
    assert MESSAGE.startswith(got)


def test_one_direction_ends(ends: Ends) -> None:
    """The worker sees an end that the server has not made, while what it sends still gets there."""
    ends.fail(Fault.HALF)
    assert b"" == ends.worker.recv(1)
    ends.pass_on(ends.worker, ends.server)


def test_a_server_that_is_away_is_a_connection_that_ends(tmp_path: Path) -> None:
    """If the link reaches no server, a connection ends at once."""
    with Link(tmp_path / "link", tmp_path / "server") as link, socket.socket(socket.AF_UNIX) as worker:
        worker.connect(str(link.path))
        worker.settimeout(PATIENCE_S)
        assert b"" == worker.recv(1)
