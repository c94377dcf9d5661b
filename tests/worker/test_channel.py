"""What a worker says: how much of it a guest may provoke, and that a gone listener stops nothing."""

from __future__ import annotations

import socket

import pytest

from xenbackend.protocol import messages
from xenbackend.worker import channel
from xenbackend.worker.channel import ALARM, BURST, LINE, REFILL_S, Channel


class Ears:
    """The supervisor's end, and a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.theirs = theirs
        self.now = 0.0
        monkeypatch.setattr(channel.time, "monotonic", lambda: self.now)
        self.channel = Channel(theirs)

    def heard(self) -> list[messages.Message]:
        """Return everything that was said since the last time."""
        said = []
        while True:
            try:
                said.append(messages.decode(self.ours.recv(messages.MAX_MESSAGE)))
            except BlockingIOError:
                return said

    def close(self) -> None:
        """Close both ends."""
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def ears(monkeypatch: pytest.MonkeyPatch) -> Ears:
    """A listener whose sockets are closed after the test."""
    ears = Ears(monkeypatch)
    yield ears
    ears.close()


def test_complaints_have_a_budget(ears: Ears) -> None:
    """A guest gets BURST lines, then one per REFILL_S; the next line says how many were left out."""
    for _ in range(1000):
        ears.channel.complain("bad")
    at_once = ears.heard()
    ears.now += REFILL_S
    ears.channel.complain("bad again")
    ears.channel.complain("bad again")

    assert [messages.Log("warning", "bad", {})] * BURST == at_once
    assert [messages.Log("warning", "bad again", {"unsaid": str(1000 - BURST)})] == ears.heard()


def test_budget_does_not_grow_beyond_the_burst(ears: Ears) -> None:
    """A guest that was quiet for a day has no more than BURST lines."""
    ears.now += 86400
    for _ in range(BURST + 5):
        ears.channel.complain("bad")

    assert BURST == len(ears.heard())


def test_complaints_are_short_and_bare(ears: Ears) -> None:
    """Nothing that a terminal or a log reader would obey gets into a line about a guest, nor a long one."""
    ears.channel.complain("\x1b[2J\nroot: all is well \u202e" + "x" * 1000)
    (line,) = ears.heard()

    assert isinstance(line, messages.Log)
    assert LINE == len(line.event)
    assert line.event.startswith("\\x1b[2J\\nroot: all is well \\u202e")


def test_alarms_are_said_whatever_the_budget(ears: Ears) -> None:
    """What an administrator must read does not come out of the guest's budget."""
    for _ in range(BURST + 5):
        ears.channel.complain("bad")
    ears.heard()
    ears.channel.alarm("a flush failed")

    assert [messages.Log("critical", "a flush failed", {})] == ears.heard()


def test_alarms_have_a_budget_of_their_own(ears: Ears) -> None:
    """Whatever raises an alarm again and again gets BURST lines of bounded length."""
    for _ in range(1000):
        ears.channel.alarm("x" * 10_000)
    lines = ears.heard()

    assert [ALARM] * BURST == [len(line.event) for line in lines if isinstance(line, messages.Log)]


def test_nobody_listening_is_no_error(ears: Ears) -> None:
    """Whoever drains while the supervisor dies is not interrupted by what it says."""
    ears.ours.close()
    ears.channel.alarm("is anybody there")
    ears.channel.say(messages.Closed())


def test_a_listener_that_does_not_listen_keeps_nobody_waiting(ears: Ears) -> None:
    """A supervisor that reads nothing loses what does not fit, and the worker goes on; what fits is read later."""
    for number in range(10_000):
        ears.channel.say(messages.Trouble(f"{number} {'x' * 1000}"))
    heard = ears.heard()
    ears.channel.say(messages.Trouble(""))

    assert 10 < len(heard) < 10_000
    assert heard == [messages.Trouble(f"{number} {'x' * 1000}") for number in range(len(heard))]
    assert [messages.Trouble("")] == ears.heard()
