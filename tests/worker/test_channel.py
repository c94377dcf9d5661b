"""What a worker says: a guest can cause a limited amount of it, and a supervisor that is gone stops nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.worker.channel import BURST, LINE, REFILL_S, RETRY_S, Channel

STANDING = messages.Standing(1, Stage.IDLE, "null:1M", read_only=False, shareable=False)


class Ears:
    """The supervisor's end of the socket, and a clock that the test moves. `standing` is the worker's standing."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.theirs = theirs
        self.now = 0.0
        self.reactor = Reactor(clock=lambda: self.now)
        self.standing = STANDING
        self.channel = Channel(theirs, self.reactor, lambda: self.standing)

    def heard(self) -> list[messages.FromWorker]:
        """Return everything that was said since the last call."""
        said = []
        while True:
            try:
                said.append(codec.from_worker(self.ours.recv(messages.MAX_MESSAGE)))
            except BlockingIOError:
                return said

    def pass_time(self, seconds: float) -> None:
        """Move the clock, and let timers expire."""
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
    """A listener, closed after the test."""
    ears = Ears()
    yield ears
    ears.close()


def test_complaints_have_a_budget(ears: Ears) -> None:
    """A guest can cause BURST lines, then one per REFILL_S; the next line says how many were left out."""
    for _ in range(1000):
        ears.channel.complain("bad")
    at_once = ears.heard()
    ears.now += REFILL_S
    ears.channel.complain("bad again")
    ears.channel.complain("bad again")

    assert [messages.Log("warning", "bad")] * BURST == at_once
    assert [messages.Log("warning", "bad again", unsaid=1000 - BURST)] == ears.heard()


def test_budget_does_not_grow_beyond_the_burst(ears: Ears) -> None:
    """A guest that was quiet for a day can still cause no more than BURST lines."""
    ears.now += 86400
    for _ in range(BURST + 5):
        ears.channel.complain("bad")

    assert BURST == len(ears.heard())


def test_complaints_are_short_and_bare(ears: Ears) -> None:
    """A line about a guest is short, and has no characters that a terminal or log reader would act on."""
    ears.channel.complain("\x1b[2J\nroot: all is well \u202e" + "x" * 1000)
    (line,) = ears.heard()

    assert isinstance(line, messages.Log)
    assert LINE == len(line.event)
    assert line.event.startswith("\\x1b[2J\\nroot: all is well \\u202e")


def test_alarms_are_said_whatever_the_budget(ears: Ears) -> None:
    """An alarm for the administrator is sent even if the guest's budget is used up."""
    for _ in range(BURST + 5):
        ears.channel.complain("bad")
    ears.heard()
    ears.channel.alarm("a flush failed")

    assert [messages.Log("critical", "a flush failed")] == ears.heard()


def test_alarms_have_a_budget_of_their_own(ears: Ears) -> None:
    """Repeated alarms are limited to BURST lines of bounded length."""
    for _ in range(1000):
        ears.channel.alarm("x" * 10_000)
    lines = ears.heard()

    assert [messages.SENTENCE_MAX] * BURST == [len(line.event) for line in lines if isinstance(line, messages.Log)]


def test_a_standing_is_said_when_it_has_changed(ears: Ears) -> None:
    """A standing is sent only if it has changed, however often the worker checks that."""
    for number in (1, 1, 2, 2):
        ears.standing = replace(STANDING, number=number)
        ears.channel.stand()

    assert [STANDING, replace(STANDING, number=2)] == ears.heard()


def test_a_standing_fits_into_a_datagram(ears: Ears) -> None:
    """If the layers of a chain do not fit into one message, the upper ones are sent."""
    layer = messages.LayerFacts("x" * 4000, 1, 512, False, False, False, 0, 0, 512)
    ears.standing = replace(STANDING, layers=[layer] * 64)
    ears.channel.stand()
    (said,) = ears.heard()

    assert isinstance(said, messages.Standing)
    assert 1 < len(said.layers) < 64


def test_any_sentence_can_be_said(ears: Ears) -> None:
    """A sentence that is too long, or has characters that no message can carry, is sent all the same."""
    for sentence in ("\ud800 and \udcff", "x" * 10_000, "\ud800" * messages.SENTENCE_MAX):
        ears.channel.alarm(sentence)
        ears.channel.reply(1, Code.BUG, sentence)

    assert 6 == len(ears.heard())


def test_nobody_listening_is_no_error(ears: Ears) -> None:
    """If the supervisor has gone, a worker's messages are dropped without an error."""
    ears.ours.close()
    ears.channel.alarm("is anybody there")
    ears.channel.stand()


def test_a_listener_that_does_not_listen_keeps_nobody_waiting(ears: Ears) -> None:
    """The worker goes on while its supervisor reads nothing. Once that reads again, it gets every reply in order, the
    standings that had fitted and the newest one; log lines are left out.
    """
    for number in range(3000):
        ears.standing = replace(STANDING, number=number, failure="x" * 1000)
        ears.channel.stand()
        ears.channel.reply(number, Code.OK, data="y" * 100)
    ears.channel.drop("memory")
    ears.channel.alarm("nobody hears this")
    heard = ears.heard()
    ears.channel.reply(3000, Code.OK)  # there is room now, and earlier messages go first
    for _ in range(100):
        ears.pass_time(RETRY_S)
        heard += ears.heard()
    standings = [each.number for each in heard if isinstance(each, messages.Standing)]

    assert list(range(3001)) == [each.id for each in heard if isinstance(each, messages.Reply)]
    assert (sorted(standings), 2999) == (standings, standings[-1])
    assert len(standings) < 1000
    assert [messages.Drop("memory"), messages.Reply(3000, Code.OK)] == heard[-2:]


def test_nothing_is_tried_again_where_all_was_heard(ears: Ears) -> None:
    """A worker that has nothing left to send has no timer running."""
    for number in range(3000):
        ears.channel.reply(number, Code.OK)
    while len(ears.heard()):
        ears.pass_time(RETRY_S)
    ears.pass_time(RETRY_S)

    assert ears.reactor._until_timer() is None
