"""What a worker may say to its supervisor, and what becomes of one that says anything else."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.errors import KernelError
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.protocol.opening import Job
from xenbackend.supervisor.service.opener import OnEnd
from xenbackend.supervisor.vbd.link import Link


class FakeProcess:
    """A worker process that is only written down."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.killed: list[str] = []
        self.is_left = False
        self.is_there = True
        self.has_broken_protocol = self.is_boosted = self.host_is_short = False

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Take note of a message, unless the host cannot take it."""
        if self.host_is_short:
            raise KernelError("send", errno.ENOBUFS)
        self.sent.append(message)

    def kill(self, sentence: str, *, is_breach: bool = False) -> None:
        """Take note."""
        self.killed.append(sentence)
        self.has_broken_protocol |= is_breach

    def leave(self) -> None:
        """Take note."""
        self.is_left = True

    def note_walls(self, standing: messages.Standing) -> None:
        """Take note."""
        self.walls = standing.walls


class Clock:
    """Stands at one millisecond, from which a link numbers."""

    def now(self) -> float:
        """Return that."""
        return 0.001


class NoOpenings:
    """Nothing that is said here opens anything."""

    def for_order(self, _order: Any) -> None:
        """Return that."""

    def for_question(self, question: Any) -> Job | None:
        """Return that, but for what makes a new image."""
        return Job("vbd/5/51712", ["null:1G"], read_only=False) if isinstance(question, messages.Branch) else None

    def kept(self) -> list[int]:
        """Return none."""
        return []

    def found(self, _found: Any, _fds: list[int]) -> str:
        """Refuse nothing."""
        return ""


class FakeFleet:
    """Starts nothing."""

    def __init__(self) -> None:
        self.process = FakeProcess()
        self.loop = Clock()

    def start(self, on_message: Any, on_end: Any, drivers: Sequence[str] = ()) -> FakeProcess:
        """Keep what would be called."""
        self.drivers = drivers
        self.say, self.end = on_message, on_end
        self.process = FakeProcess()
        return self.process

    def open(self, _job: Job, _kept: Any, _found: Any, on_end: OnEnd, _waits: Any) -> tuple[Any, socket.socket]:
        """Return an opener that does nothing, and keep what would be called."""
        opener: Any = SimpleNamespace(kill=lambda: None, hangs=lambda: False)
        self.end_opener = partial(on_end, opener)
        near, far = socket.socketpair()
        far.close()
        return opener, near


class Owner:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.breaches = 0
        self.handover = SimpleNamespace(keep=self._keep, drop=lambda name: self.heard.append(("drops", name)))
        self.log = SimpleNamespace(say_for_worker=self._say)

    def stands(self, standing: messages.Standing, *, is_last: bool) -> None:
        """Take note."""
        self.heard.append(standing if is_last else ("before", standing.number))
        if standing.failure == "bug":
            raise ZeroDivisionError

    def _keep(self, name: str, fd: int) -> bool:
        os.close(fd)
        self.heard.append(("keeps", name))
        return name != "no memory"

    def _say(self, level: str, event: str, **fields: str) -> None:
        self.heard.append((level, event, fields))

    def ends(self, worker: FakeProcess, sentence: str) -> None:
        """Take note."""
        self.heard.append(("ends", sentence))
        self.breaches += worker.has_broken_protocol

    def fault(self, bug: Exception) -> None:
        """Take note."""
        self.heard.append(("fault", type(bug)))


class Linked:
    """A link, its owner and its process."""

    def __init__(self) -> None:
        self.owner, self.fleet = Owner(), FakeFleet()
        self.link = Link(self.owner, self.fleet, NoOpenings())  # type: ignore[arg-type]
        self.link.start()
        self.process = self.fleet.process


@pytest.fixture
def linked() -> Linked:
    """A worker that was just started."""
    return Linked()


def standing(number: int, **changes: Any) -> messages.Standing:
    """Return where a worker stands that has taken an order."""
    return messages.Standing(number, Stage.OPEN, "null:1G", read_only=False, shareable=False, **changes)


def test_only_what_answers_the_last_order_is_heard(linked: Linked) -> None:
    """A standing of an earlier order is told as such: another one is on its way. One of a later order is a lie."""
    linked.link.order(messages.Report)
    linked.link.order(messages.Leave)
    numbers = [each.number for each in linked.process.sent]
    for number in numbers:
        linked.fleet.say(standing(number), [])
    assert numbers == sorted(set(numbers))
    assert [("before", numbers[0]), standing(numbers[-1])] == linked.owner.heard
    linked.fleet.say(standing(numbers[-1] + 1), [])

    assert ["the worker was killed: it answers order 1003, which nobody gave"] == linked.process.killed


def test_a_worker_is_told_of_third_parties(linked: Linked) -> None:
    """Whatever its chain has that is none of ours it imports before it serves; a text that is no chain has nothing."""
    told = []
    for chain in ("xor:|log:|canary:|xor:|aio:/img", "aio:/img", "no chain"):
        linked.link.start(chain)
        told.append(linked.fleet.drivers)

    assert [["canary", "xor"], [], []] == told


def test_what_a_worker_is_behind_is_noted(linked: Linked) -> None:
    """What the last standing says of walls is what `status` shows; a lie about a number changes nothing."""
    linked.link.order(messages.Report)
    number = linked.process.sent[-1].number
    linked.fleet.say(standing(number, walls=["user"]), [])
    linked.fleet.say(standing(number + 1, walls=[]), [])

    assert ["user"] == linked.process.walls


def test_each_question_has_one_reply(linked: Linked) -> None:
    """The reply goes to who asked that; a second one, or one to a question that nobody asked, ends the worker."""
    replies: list[messages.Reply] = []
    linked.link.ask(messages.Pause(), replies.append)
    linked.link.ask(messages.Resume(), replies.append)
    second, first = (messages.Reply(ask.id, Code.OK) for ask in reversed(linked.process.sent))
    linked.fleet.say(second, [])
    linked.fleet.say(first, [])
    assert [second, first] == replies
    assert not linked.process.killed
    linked.fleet.say(first, [])

    assert 1 == len(linked.process.killed)


def test_a_reply_to_an_earlier_service_is_passed_over(linked: Linked) -> None:
    """The worker that was inherited may still have to answer what that one had asked."""
    linked.fleet.say(messages.Reply(999, Code.OK), [])

    assert not linked.process.killed


def test_what_is_asked_of_a_worker_that_ends_is_answered(linked: Linked) -> None:
    """Nobody waits for the dead; where there is no worker at all the answer comes at once."""
    replies: list[messages.Reply] = []
    linked.link.ask(messages.Pause(), lambda reply: (replies.append(reply), linked.owner.heard.append("reply")))
    linked.fleet.end("the worker was ended by SIGKILL")
    linked.link.ask(messages.Pause(), replies.append)

    assert [Code.GONE, Code.GONE] == [each.code for each in replies]
    assert ["reply", ("ends", "the worker was ended by SIGKILL")] == linked.owner.heard


def test_what_cannot_be_sent_is_answered(linked: Linked) -> None:
    """Nobody waits for ever for what the host has not taken: a question has failed, and a worker that would never hear
    of an order is replaced.
    """
    replies: list[messages.Reply] = []
    linked.process.host_is_short = True
    linked.link.ask(messages.Pause(), replies.append)
    asked = [*linked.process.killed]
    linked.link.order(messages.Leave)

    assert [(Code.FAILED, "send: No buffer space available")] == [(each.code, each.sentence) for each in replies]
    assert ([], ["the worker was killed: send: No buffer space available"]) == (asked, linked.process.killed)


def test_what_a_worker_may_say_at_any_time(linked: Linked) -> None:
    """Memories and lines are handed on; what it asks and we do not know is refused, not left open."""
    linked.fleet.say(messages.Keep("map", 4096), [os.open("/dev/null", os.O_RDONLY)])
    linked.fleet.say(messages.Drop("map"), [])
    linked.fleet.say(messages.Log("info", "x" * 10_000, unsaid=3), [])
    linked.fleet.say(messages.Ask(7, messages.Pause()), [])

    assert [("keeps", "map"), ("drops", "map"), ("info", "x" * 4000, {"unsaid": "3"})] == linked.owner.heard
    assert (7, Code.INVALID) == (linked.process.sent[0].id, linked.process.sent[0].code)


def test_a_memory_that_is_none_ends_its_sender(linked: Linked) -> None:
    """Only what the next worker can be given is kept."""
    linked.fleet.say(messages.Keep("no memory", 4096), [os.open("/dev/null", os.O_RDONLY)])

    assert 1 == len(linked.process.killed)


def test_a_message_that_finds_a_fault_of_ours_ends_its_sender(linked: Linked) -> None:
    """The fault is told to the vbd, the worker is replaced, and nothing else is harmed."""
    linked.link.order(messages.Report)
    linked.fleet.say(standing(linked.process.sent[-1].number, failure="bug"), [])

    assert ("fault", ZeroDivisionError) == linked.owner.heard[-1]
    assert linked.process.killed


def test_nothing_is_heard_of_a_worker_that_was_let_go(linked: Linked) -> None:
    """It goes on for the next service: it is not killed, and what was asked of it is answered by whoever lets go."""
    replies: list[messages.Reply] = []
    linked.link.ask(messages.Pause(), replies.append)
    linked.link.let_go("the service is being replaced", leaves=True)
    linked.fleet.say(messages.Log("info", "late"), [])
    linked.fleet.say(messages.Reply(12345, Code.OK), [])

    assert linked.process.is_left
    assert (["the service is being replaced"], [], []) == (
        [each.sentence for each in replies],
        linked.owner.heard,
        linked.process.killed,
    )


def test_a_successor_has_not_asked_what_its_predecessor_did(linked: Linked) -> None:
    """An opener that was asked nonsense may be seen to end after its worker, when another one is there already."""
    linked.link.ask(messages.Branch("/leaf", ""), lambda _: None)
    linked.fleet.end_opener("it asks for nonsense")
    linked.fleet.end("it was killed by SIGKILL")
    linked.link.start()
    linked.link.ask(messages.Branch("/leaf", ""), lambda _: None)
    linked.fleet.end("it was killed by SIGKILL")
    linked.link.start()
    linked.fleet.end_opener("it asks for nonsense")

    assert ["the worker was killed: it asks for nonsense"] == linked.process.killed
    assert [] == linked.fleet.process.killed


def test_a_breach_is_told_with_the_end(linked: Linked) -> None:
    """Its vbd hears once, with the worker's end, that it had broken the protocol; of another end it hears nothing."""
    linked.fleet.end("it was killed by SIGKILL")
    first = linked.owner.breaches
    linked.link.start()
    linked.link.breach("it said what cannot be")
    linked.fleet.end("it was killed by SIGKILL")

    assert (0, 1) == (first, linked.owner.breaches)
