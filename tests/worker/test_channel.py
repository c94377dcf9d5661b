"""What a worker says: how much of it a guest may provoke, and that a gone listener stops nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.worker.channel import BURST, LINE, REFILL_S, RETRY_S, Channel

STANDING = messages.Standing(1, Stage.IDLE, "null:1M", read_only=False, shareable=False)


class Ears:
    """The supervisor's end, and a clock that the test moves; `standing` is where the worker stands."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.theirs = theirs
        self.now = 0.0
        self.reactor = Reactor(clock=lambda: self.now)
        self.standing = STANDING
        self.channel = Channel(theirs, self.reactor, lambda: self.standing)

    def heard(self) -> list[messages.FromWorker]:
        """Return everything that was said since the last time."""
        said = []
        while True:
            try:
                said.append(codec.from_worker(self.ours.recv(messages.MAX_MESSAGE)))
            except BlockingIOError:
                return said

    def pass_time(self, seconds: float) -> None:
        """Move the clock, and let timers go off."""
        self.now += seconds
        self.reactor.call_soon(self.reactor.stop)
        self.reactor.run()

    def close(self) -> None:
        """Close both ends."""
        self.reactor.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def ears() -> Iterator[Ears]:
    """A listener whose sockets are closed after the test."""
    ears = Ears()
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

    assert [messages.Log("warning", "bad")] * BURST == at_once
    assert [messages.Log("warning", "bad again", unsaid=1000 - BURST)] == ears.heard()


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

    assert [messages.Log("critical", "a flush failed")] == ears.heard()


def test_alarms_have_a_budget_of_their_own(ears: Ears) -> None:
    """Whatever raises an alarm again and again gets BURST lines of bounded length."""
    for _ in range(1000):
        ears.channel.alarm("x" * 10_000)
    lines = ears.heard()

    assert [messages.SENTENCE_MAX] * BURST == [len(line.event) for line in lines if isinstance(line, messages.Log)]


def test_a_standing_is_said_when_it_has_changed(ears: Ears) -> None:
    """Whatever makes the worker look whether it has to say something: what was said is not said again."""
    for number in (1, 1, 2, 2):
        ears.standing = replace(STANDING, number=number)
        ears.channel.stand()

    assert [STANDING, replace(STANDING, number=2)] == ears.heard()


def test_a_standing_fits_into_a_datagram(ears: Ears) -> None:
    """Of a chain whose layers have more to say than a message holds, the upper ones are told."""
    layer = messages.LayerFacts("x" * 4000, 1, 512, False, False, False, 0, 0, 512)
    ears.standing = replace(STANDING, layers=[layer] * 64)
    ears.channel.stand()
    (said,) = ears.heard()

    assert isinstance(said, messages.Standing)
    assert 1 < len(said.layers) < 64


def test_any_sentence_can_be_said(ears: Ears) -> None:
    """What an exception says may be long, or hold what no message takes: it is said all the same."""
    for sentence in ("\ud800 and \udcff", "x" * 10_000, "\ud800" * messages.SENTENCE_MAX):
        ears.channel.alarm(sentence)
        ears.channel.reply(1, Code.BUG, sentence)

    assert 6 == len(ears.heard())


def test_nobody_listening_is_no_error(ears: Ears) -> None:
    """Whoever drains while the supervisor dies is not interrupted by what it says."""
    ears.ours.close()
    ears.channel.alarm("is anybody there")
    ears.channel.stand()


def test_a_listener_that_does_not_listen_keeps_nobody_waiting(ears: Ears, tmp_path: Path) -> None:
    """The worker goes on while a supervisor reads nothing. Once it does it hears every reply and memory, in order,
    and of standings those that had fitted and the newest one; lines of the log are left out.
    """
    with (tmp_path / "memory").open("w+b") as file:
        for number in range(3000):
            ears.standing = replace(STANDING, number=number, failure="x" * 1000)
            ears.channel.stand()
            ears.channel.reply(number, Code.OK, data="y" * 100)
        ears.channel.keep("memory", 5, file.fileno())
        file.write(b"kept!")
    ears.channel.alarm("nobody hears this")
    heard = ears.heard()
    ears.channel.reply(3000, Code.OK)  # there is room now, and others come first
    for _ in range(100):
        ears.pass_time(RETRY_S)
        heard += ears.heard()
    standings = [each.number for each in heard if isinstance(each, messages.Standing)]

    assert list(range(3001)) == [each.id for each in heard if isinstance(each, messages.Reply)]
    assert (sorted(standings), 2999) == (standings, standings[-1])
    assert len(standings) < 1000
    assert [messages.Keep("memory", 5), messages.Reply(3000, Code.OK)] == heard[-2:]


def test_nothing_is_tried_again_where_all_was_heard(ears: Ears) -> None:
    """A worker that has nothing left to say has no timer that wakes it."""
    for number in range(3000):
        ears.channel.reply(number, Code.OK)
    while len(ears.heard()):
        ears.pass_time(RETRY_S)
    ears.pass_time(RETRY_S)

    assert ears.reactor._until_timer() is None
