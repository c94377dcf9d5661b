"""What a worker may tell its supervisor, and what happens to one that says anything else."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.errors import KernelError
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.jobs import Job
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.service.opener import OnEnd
from xenbackend.supervisor.vbd.link import Link


class FakeProcess:
    """A stand-in for a worker process, which records what is done with it."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.killed: list[str] = []
        self.heard = 0
        self.is_left = False
        self.is_there = True
        self.has_broken_protocol = self.is_boosted = self.host_is_short = False

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Record a message, unless the host is short of memory."""
        if self.host_is_short:
            raise KernelError("send", errno.ENOBUFS)
        self.sent.append(message)

    def kill(self, sentence: str, *, is_breach: bool = False) -> None:
        """Record it."""
        self.killed.append(sentence)
        self.has_broken_protocol |= is_breach

    def hear(self) -> None:
        """Record it."""
        self.heard += 1

    def leave(self) -> None:
        """Record it."""
        self.is_left = True

    def note_walls(self, standing: messages.Standing) -> bool:
        """Record the walls; no worker is behind none."""
        self.walls = standing.walls
        return self.walls != ["none"]


class Clock:
    """A clock that stands at one millisecond."""

    def now(self) -> float:
        """Return a time from which the link numbers its orders."""
        return 0.001


class NoOpenings:
    """Openings of a disk for which hardly anything is opened."""

    def for_order(self, _order: Any) -> None:
        """Return None."""

    def for_question(self, question: Any) -> Job | None:
        """Return a job for a new image or lost connections, and None for any other question."""
        is_reconnect = isinstance(question, messages.Reconnect)
        job = Job("vbd/5/51712", ["null:1G"], read_only=False, only_connects=is_reconnect)
        return job if is_reconnect or isinstance(question, messages.Branch) else None

    def believed_export(self, path: str) -> str | None:
        """Believe that none is served, and do not show another service's path."""
        return {"": "", "/former": ""}.get(path)

    def kept(self) -> list[int]:
        """Return no descriptors."""
        return []

    def found(self, _question: Any, _found: Any, _fds: list[int]) -> str:
        """Accept whatever an opener has found."""
        return ""


class FakeFleet:
    """A fleet that starts no process."""

    def __init__(self) -> None:
        self.process = FakeProcess()
        self.loop = Clock()
        self.hangs = False  # whether its openers do

    def start(self, on_message: Any, on_end: Any, drivers: Sequence[str] = ()) -> FakeProcess:
        """Record the callbacks, and return a fake process."""
        self.drivers = drivers
        self.say, self.end = on_message, on_end
        self.process = FakeProcess()
        return self.process

    def open(self, _job: Job, _kept: Any, _found: Any, on_end: OnEnd, _waits: Any) -> tuple[Any, socket.socket]:
        """Record the callback, and return an opener that does nothing."""
        opener: Any = SimpleNamespace(kill=lambda: None, hangs=lambda: self.hangs, note_over=lambda: None)
        self.end_opener = partial(on_end, opener)
        near, far = socket.socketpair()
        far.close()
        return opener, near


class Owner:
    """A stand-in for a vbd, which records what its link tells it."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.breaches = 0
        self.handover = SimpleNamespace(drop=lambda name: self.heard.append(("drops", name)))
        self.log = SimpleNamespace(say_for_worker=self._say)

    def stands(self, standing: messages.Standing, *, is_last: bool) -> None:
        """Record it."""
        self.heard.append(standing if is_last else ("before", standing.number))
        if standing.failure == "bug":
            raise ZeroDivisionError

    def _say(self, level: str, event: str, **fields: str) -> None:
        self.heard.append((level, event, fields))

    def ends(self, worker: FakeProcess, sentence: str) -> None:
        """Record it."""
        self.heard.append(("ends", sentence))
        self.breaches += worker.has_broken_protocol

    def fault(self, bug: Exception) -> None:
        """Record it."""
        self.heard.append(("fault", type(bug)))


class Linked:
    """A link, its owner and its process."""

    def __init__(self) -> None:
        self.owner, self.fleet = Owner(), FakeFleet()
        self.link = Link(self.owner, self.fleet, NoOpenings())
        self.link.start()
        self.process = self.fleet.process


@pytest.fixture
def linked() -> Linked:
    """A link whose worker has just been started."""
    return Linked()


def standing(number: int, **changes: Any) -> messages.Standing:
    """Return a worker's standing after an order."""
    return messages.Standing(number, Stage.OPEN, "null:1G", read_only=False, shareable=False, **changes)


def test_only_what_answers_the_last_order_is_heard(linked: Linked) -> None:
    """A standing that answers an earlier order is marked as such, since another one will come. One that answers a later
    order is a breach.
    """
    linked.link.order(messages.Report)
    linked.link.order(messages.Leave)
    numbers = [each.number for each in linked.process.sent]
    for number in numbers:
        linked.fleet.say(standing(number))
    assert numbers == sorted(set(numbers))
    assert [("before", numbers[0]), standing(numbers[-1])] == linked.owner.heard
    linked.fleet.say(standing(numbers[-1] + 1))

    assert ["the worker was killed: it answers order 1003, which nobody gave"] == linked.process.killed


def test_a_device_model_is_not_led_to_a_path_that_nobody_named(linked: Linked) -> None:
    """A worker that says that it serves a device model at a path that nobody has named is killed, whichever order it
    answers, and the path goes no further.
    """
    linked.link.order(messages.Report)
    number = linked.process.sent[-1].number
    for each in (standing(number, export="/former"), standing(number, export="/theirs"), standing(1, export="/x")):
        linked.fleet.say(each)
    sentence = "the worker was killed: it says that it serves a device model at a path that nobody named"

    assert [standing(number)] == linked.owner.heard
    assert [sentence] * 2 == linked.process.killed


def test_a_worker_is_heard_as_long_as_there_is_one(linked: Linked) -> None:
    """A link has its worker heard when it is asked to, and nobody once the worker has ended."""
    linked.link.hear()
    linked.fleet.end("it has ended")
    linked.link.hear()

    assert 1 == linked.process.heard


def test_a_worker_is_told_of_the_drivers_of_its_chain(linked: Linked) -> None:
    """A new worker is told which drivers its chain has, each once, to get what they need before its walls go up; for
    an invalid chain there are none.
    """
    told = []
    for chain in ("xor:|log:|canary:|xor:|aio:/img", "aio:/img", "no chain"):
        linked.link.start(chain)
        told.append(linked.fleet.drivers)

    assert [["aio", "canary", "log", "xor"], ["aio"], []] == told


def test_what_a_worker_is_behind_is_noted(linked: Linked) -> None:
    """The walls in the last valid standing are those that `status` shows; a standing with a wrong number changes
    nothing. One with walls that cannot be is not passed on.
    """
    linked.link.order(messages.Report)
    number = linked.process.sent[-1].number
    linked.fleet.say(standing(number, walls=["user"]))
    linked.fleet.say(standing(number + 1, walls=[]))

    assert ["user"] == linked.process.walls
    linked.fleet.say(standing(number, walls=["none"]))
    assert [standing(number, walls=["user"])] == linked.owner.heard


def test_each_question_has_one_reply(linked: Linked) -> None:
    """Each reply goes to whoever asked that question. A second reply, or one to no question, ends the worker."""
    replies: list[messages.Reply] = []
    linked.link.ask(messages.Pause(), replies.append)
    linked.link.ask(messages.Resume(), replies.append)
    second, first = (messages.Reply(ask.id, Code.OK) for ask in reversed(linked.process.sent))
    linked.fleet.say(second)
    linked.fleet.say(first)
    assert [second, first] == replies
    assert not linked.process.killed
    linked.fleet.say(first)

    assert 1 == len(linked.process.killed)


def test_a_reply_to_an_earlier_service_is_passed_over(linked: Linked) -> None:
    """A reply of an inherited worker to a question of the earlier service is ignored."""
    linked.fleet.say(messages.Reply(999, Code.OK))

    assert not linked.process.killed


def test_what_is_asked_of_a_worker_that_ends_is_answered(linked: Linked) -> None:
    """A question to a worker that ends is answered before the end is reported; without a worker, at once."""
    replies: list[messages.Reply] = []
    linked.link.ask(messages.Pause(), lambda reply: (replies.append(reply), linked.owner.heard.append("reply")))
    linked.fleet.end("the worker was ended by SIGKILL")
    linked.link.ask(messages.Pause(), replies.append)

    assert [Code.GONE, Code.GONE] == [each.code for each in replies]
    assert ["reply", ("ends", "the worker was ended by SIGKILL")] == linked.owner.heard


def test_what_cannot_be_sent_is_answered(linked: Linked) -> None:
    """If the host cannot send a question, it is answered as failed. If it cannot send an order, the worker is killed,
    as it would never hear of it.
    """
    replies: list[messages.Reply] = []
    linked.process.host_is_short = True
    linked.link.ask(messages.Pause(), replies.append)
    asked = [*linked.process.killed]
    linked.link.order(messages.Leave)

    assert [(Code.FAILED, "send: No buffer space available")] == [(each.code, each.sentence) for each in replies]
    assert ([], ["the worker was killed: send: No buffer space available"]) == (asked, linked.process.killed)


def test_what_a_worker_may_say_at_any_time(linked: Linked) -> None:
    """Memories to drop and log lines are handed on at any time; a question from a worker is refused."""
    linked.fleet.say(messages.Drop("map"))
    linked.fleet.say(messages.Log("info", "x" * 10_000, unsaid=3))
    linked.fleet.say(messages.Ask(7, messages.Pause()))

    assert [("drops", "map"), ("info", "x" * 4000, {"unsaid": "3"})] == linked.owner.heard
    assert (7, Code.INVALID) == (linked.process.sent[0].id, linked.process.sent[0].code)


def test_a_message_that_finds_a_fault_of_ours_ends_its_sender(linked: Linked) -> None:
    """If the handling of a message raises an exception, the vbd is told, and the worker is killed."""
    linked.link.order(messages.Report)
    linked.fleet.say(standing(linked.process.sent[-1].number, failure="bug"))

    assert ("fault", ZeroDivisionError) == linked.owner.heard[-1]
    assert linked.process.killed


def test_nothing_is_heard_of_a_worker_that_was_let_go(linked: Linked) -> None:
    """A worker that is left to the next service is not killed, and nothing more is heard from it; its open questions
    are answered.
    """
    replies: list[messages.Reply] = []
    linked.link.ask(messages.Pause(), replies.append)
    linked.link.let_go("the service is being replaced", leaves=True)
    linked.fleet.say(messages.Log("info", "late"))
    linked.fleet.say(messages.Reply(12345, Code.OK))

    assert linked.process.is_left
    assert (["the service is being replaced"], [], []) == (
        [each.sentence for each in replies],
        linked.owner.heard,
        linked.process.killed,
    )


def test_a_successor_has_not_asked_what_its_predecessor_did(linked: Linked) -> None:
    """If the opener of a dead worker is found to have been asked nonsense, the successor is not blamed for it."""
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


def test_one_opener_at_a_time_connects_again(linked: Linked) -> None:
    """A worker that wants connections gets no other opener while it keeps the one that it had for that, unless storage
    makes that one hang: two that hang are the most.
    """
    replies: list[messages.Reply] = []

    def ask() -> int:
        """Ask, have the worker answer if it can, and return how many questions it got."""
        linked.link.ask(messages.Reconnect(), replies.append)
        if len(linked.process.sent) > len(answered):
            answered.append(linked.process.sent[-1].id)
            linked.fleet.say(messages.Reply(answered[-1], Code.OK))
        return len(answered)

    answered: list[int] = []
    assert (1, 1) == (ask(), ask())
    assert [Code.OK, Code.FAILED] == [each.code for each in replies]
    linked.fleet.end_opener("")
    assert (2, 2) == (ask(), ask())
    linked.fleet.hangs = True
    assert (3, 3) == (ask(), ask())
    assert "its storage has failed to answer 2 times" in replies[-1].sentence


def test_a_breach_is_told_with_the_end(linked: Linked) -> None:
    """A vbd is told with its worker's end whether the worker had broken the protocol."""
    linked.fleet.end("it was killed by SIGKILL")
    first = linked.owner.breaches
    linked.link.start()
    linked.link.breach("it said what cannot be")
    linked.fleet.end("it was killed by SIGKILL")

    assert (0, 1) == (first, linked.owner.breaches)
