"""The disk as a device model has it: begun if it can be, and ended before anybody else is above the chain."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.exported import SIZE, Client, HeldChain
from xenbackend.block.driver import Geometry
from xenbackend.loop.reactor import Reactor
from xenbackend.nbd.abi import CMD_WRITE
from xenbackend.protocol import messages
from xenbackend.worker.boot import Boot
from xenbackend.worker.channel import Channel
from xenbackend.worker.files import HostFiles


class Booted:
    """A disk that boots, in the test's own thread; `steps` is what happened, in order."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "nbd" / "sock"
        self.chain = HeldChain(Geometry(size=SIZE))
        self.reactor = Reactor(on_bug=self._note_bug)
        self.files = HostFiles(self.reactor)
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self._theirs = theirs
        self.steps: list[str] = []
        self.boot = Boot(self.reactor, Channel(theirs), self._flush, self._note_bug)

    def begin(self, path: str = "") -> None:
        """Export the disk."""
        self.boot.begin(path or str(self.path), self.chain, self.files)

    def step(self, passes: int = 1) -> None:
        """Let the loop pass."""
        for _ in range(passes):
            self.reactor.call_soon(self.reactor.stop)
            self.reactor.run()

    def close(self) -> None:
        """Release everything."""
        self.boot.end(lambda: None)
        self.chain.holding = False
        if self.chain.held:
            self.chain.give_back()
        self.step(4)
        self.files.close()
        self.reactor.close()
        self.ours.close()
        self._theirs.close()

    def _flush(self, then: Callable[[], None]) -> None:
        self.steps.append("flush")
        self.reactor.call_soon(then)

    def _note_bug(self, bug: Exception) -> None:
        self.steps.append(f"bug {bug}")


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Booted]:
    """A disk that boots."""
    booted = Booted(tmp_path)
    yield booted
    booted.close()


def test_without_an_export_there_is_nothing_to_end(booted: Booted) -> None:
    """Most guests never boot this way: whoever wants the chain has it at once, and nothing is flushed."""
    booted.boot.end(lambda: booted.steps.append("then"))

    assert ["then"] == booted.steps
    assert "" == booted.boot.path


def test_it_ends_with_a_flush_before_anybody_goes_on(booted: Booted) -> None:
    """What is in flight comes first, then our flush, then whoever waits, in the order in which they asked."""
    booted.begin()
    path = booted.boot.path
    client = Client(booted)
    client.go()
    booted.chain.holding = True
    client.ask(CMD_WRITE, data=b"x" * 512)
    booted.step(2)
    for who in ("connect", "disconnect"):
        booted.boot.end(lambda who=who: booted.steps.append(who))
    booted.step(3)
    during = booted.steps[:]
    booted.chain.give_back()
    booted.step(4)
    client.close()

    assert str(booted.path) == path
    assert [] == during
    assert ["flush", "connect", "disconnect"] == booted.steps
    assert ("", False) == (booted.boot.path, booted.path.exists())


def test_it_can_begin_again(booted: Booted) -> None:
    """A disk that was ended can be exported anew: at the same place, with nothing left of the first time."""
    for _ in range(2):
        booted.steps.clear()
        booted.begin()
        booted.boot.end(lambda: booted.steps.append("then"))
        booted.step(3)

        assert ["flush", "then"] == booted.steps


def test_a_socket_that_cannot_be_made_is_told(booted: Booted) -> None:
    """Where no socket can be made the guest cannot boot from it, which an administrator reads; the disk is there."""
    (booted.path.parent).write_text("a file where the directory should be")
    booted.begin()
    line = messages.decode(booted.ours.recv(messages.MAX_MESSAGE))

    assert isinstance(line, messages.Log)
    assert "no device model can boot from this disk" in line.event
    assert "" == booted.boot.path


def test_bugs_of_that_time_are_remembered(booted: Booted) -> None:
    """D8: what a bug of a layer lost may come back to whoever is above the chain later, who has to know."""
    booted.begin()
    client = Client(booted)
    client.go()
    booted.chain.bug = KeyError("x")
    client.ask(CMD_WRITE, data=b"x" * 512)
    booted.step(3)
    before = booted.boot.had_bugs
    booted.boot.end(lambda: None)
    booted.step(3)
    client.close()

    assert (False, True) == (before, booted.boot.had_bugs)
    assert ["bug 'x'", "flush"] == booted.steps
