"""What a supervisor may rely on in a worker: in the real one, and in the fake one of the supervisor's tests.

Any other program that speaks `protocol.messages` as a worker has to pass these tests too: add it to `KINDS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.driven import DOMID, WorkerProcess
from xenbackend import journal
from xenbackend.blkif.abi import NATIVE
from xenbackend.kernel.ports import open_host
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import GuestRing
from xenbackend.rig.xen import Xen

pytestmark = pytest.mark.slow  # each starts a process
FAKE = Path(__file__).parent.parent / "supervisor" / "fake_worker.py"


@dataclass(frozen=True)
class Kind:
    """A program that takes `--socket N`, and chains that it knows.

    good     can be opened
    other    may take the place of `good`
    unfit    may not take it
    broken   cannot be opened
    """

    command: tuple[str, ...]
    good: str
    other: str
    unfit: str
    broken: str


KINDS = {
    "real": Kind((), good="null:1G", other="null:7G", unfit="null:512M", broken="aio:/nonexistent/image"),
    "fake": Kind((sys.executable, str(FAKE)), good="null:1G", other="null:7G", unfit="null:5G", broken="null:2G"),
}


class Candidate:
    """A worker, and rings that it can serve. `heard` holds every message that it has sent."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        self.kind = kind
        self.xen = Xen(directory)
        self.xen.start()
        self.guest = Guest(directory, DOMID, 64)
        self.host = f"xenbackend.rig.host:{directory}"
        self.worker = WorkerProcess(self.host, command=kind.command)
        self.heard: list[messages.FromWorker] = []
        self.asked: list[int] = []

    def connect(self) -> messages.Connect:
        """Return the message that connects a new frontend."""
        ring = GuestRing(self.guest, NATIVE, 0, open_host(self.host).fence)
        return messages.Connect(
            NATIVE.protocol, [messages.RingParameters(ring.grefs, ring.port.number)], persistent=True
        )

    def open(self, chain: str = "") -> messages.Standing:
        """Let the worker open a chain, and return its standing afterwards."""
        self.heard.append(self.worker.open(chain or self.kind.good))
        return self.standings[-1]

    def tell(self, kind: type[messages.Order], *fields: object) -> messages.Standing:
        """Give an order, and return the worker's standing once the order has been carried out."""
        self.worker.tell(kind, *fields)
        return self.hear_until(lambda it: self.answers(it) and it.stage not in (Stage.CONNECTING, Stage.LEAVING))

    def answers(self, message: messages.FromWorker) -> bool:
        """Return whether a message is the standing that answers the last order."""
        return isinstance(message, messages.Standing) and message.number == self.worker.number

    def put(self, question: messages.Question) -> None:
        """Send a question."""
        self.asked.append(self.worker.put(question))

    def ask(self, question: messages.Question) -> messages.Reply:
        """Send a question, and return the reply."""
        self.put(question)
        return self.hear_until(lambda it: isinstance(it, messages.Reply) and it.id == self.asked[-1])

    def hear_until(self, is_last: Callable[[Any], bool]) -> Any:
        """Receive messages until `is_last` accepts one, and return that one."""
        while True:
            message = self.worker.hear()
            assert message is not None, f"it has ended, and had said {self.heard}"
            self.heard.append(message)
            if is_last(message):
                return message

    def end(self) -> None:
        """Order the worker to close, and receive everything that it still sends."""
        self.worker.tell(messages.Close)
        while (message := self.worker.hear()) is not None:
            self.heard.append(message)

    @property
    def standings(self) -> list[messages.Standing]:
        """Return all standings received so far."""
        return [each for each in self.heard if isinstance(each, messages.Standing)]

    @property
    def replied(self) -> list[int]:
        """Return the ids of the questions that have been replied to."""
        return [each.id for each in self.heard if isinstance(each, messages.Reply)]

    def close(self) -> None:
        """Release everything."""
        self.worker.drop()
        self.guest.close()
        self.xen.close()


@pytest.fixture(params=KINDS)
def candidate(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Candidate]:
    """A worker that has been told nothing yet. In the end, standings must be in order and all questions replied to."""
    candidate = Candidate(KINDS[request.param], tmp_path)
    try:
        yield candidate
        numbers = [each.number for each in candidate.standings]
        assert sorted(numbers) == numbers
        assert all(one != two for one, two in pairwise(candidate.standings)), "it said twice where it stands"
        assert sorted(candidate.asked) == sorted(candidate.replied)
    finally:
        candidate.close()


def test_each_order_is_answered_by_where_it_stands(candidate: Candidate) -> None:
    """The worker answers every order by a standing with that order's number, even if the same order is given again."""
    stages = [candidate.tell(messages.Report).stage, candidate.open().stage]
    for _ in range(2):
        stages.append(candidate.tell(messages.Serve, candidate.connect()).stage)
        stages += [candidate.tell(kind).stage for kind in (messages.Report, messages.Leave, messages.Leave)]
    candidate.end()

    assert [Stage.IDLE, Stage.OPEN, *[Stage.SERVING, Stage.SERVING, Stage.OPEN, Stage.OPEN] * 2] == stages
    assert (candidate.worker.number, Stage.IDLE) == (candidate.standings[-1].number, candidate.standings[-1].stage)
    assert 0 == candidate.worker.process.wait(10)


def test_a_standing_holds_everything(candidate: Candidate) -> None:
    """Each standing is complete, so a supervisor that comes later learns as much as the one before it."""
    opened = candidate.open()
    served = candidate.tell(messages.Serve, candidate.connect())
    again = candidate.tell(messages.Report)
    left = candidate.tell(messages.Leave)

    assert (candidate.kind.good, "", 0) == (opened.chain, opened.failure, opened.errno)
    assert [candidate.kind.good] == [layer.text for layer in opened.layers]
    assert replace(opened, number=served.number, stage=Stage.SERVING) == served
    assert replace(served, number=again.number) == again
    assert replace(opened, number=left.number) == left


def test_what_cannot_be_opened_is_told(candidate: Candidate) -> None:
    """A chain that cannot be opened is reported as a failure, also to a later Report. The worker can then be closed."""
    standing = candidate.open(candidate.kind.broken)
    again = candidate.tell(messages.Report)
    candidate.end()

    assert (Stage.IDLE, candidate.kind.broken, []) == (standing.stage, standing.chain, standing.layers)
    assert standing.failure
    assert standing.is_mistake
    assert standing.errno
    assert replace(standing, number=again.number) == again
    assert 0 == candidate.worker.process.wait(10)


@pytest.mark.parametrize("is_served", [False, True])
def test_what_a_question_changes_is_told_before_its_reply(candidate: Candidate, is_served: bool) -> None:
    """If a question changes the chain or pauses the disk, the new standing arrives before the reply."""
    candidate.open()
    if is_served:
        candidate.tell(messages.Serve, candidate.connect())
    for question, field, value in (
        (messages.Swap(candidate.kind.other, replaces=True), "chain", candidate.kind.other),
        (messages.Pause(), "is_paused", True),
        (messages.Resume(), "is_paused", False),
    ):
        reply = candidate.ask(question)

        assert (Code.OK, "") == (reply.code, reply.sentence)
        assert value == getattr(candidate.standings[-1], field)
    assert [candidate.kind.other] == [layer.text for layer in candidate.standings[-1].layers]


def test_what_cannot_be_asked_changes_nothing(candidate: Candidate) -> None:
    """An invalid question is answered by the code `invalid` and a sentence, and the standing does not change."""
    opened = candidate.open()
    replies = [
        candidate.ask(messages.Swap(candidate.kind.unfit, replaces=True)),
        candidate.ask(messages.Command("nobody", "sing", [])),
    ]
    standing = candidate.tell(messages.Report)

    assert [Code.INVALID] * 2 == [reply.code for reply in replies]
    assert all(reply.sentence for reply in replies)
    assert replace(opened, number=standing.number) == standing


def test_a_look_at_a_chain_is_none_more(candidate: Candidate) -> None:
    """A dry run of an exchange returns the layers of the other chain and does not replace the chain in service."""
    opened = candidate.open()
    reply = candidate.ask(messages.Swap(candidate.kind.other, replaces=True, is_dry_run=True))
    standing = candidate.tell(messages.Report)

    assert (Code.OK, [candidate.kind.other]) == (reply.code, json.loads(reply.data))
    assert replace(opened, number=standing.number) == standing


def test_what_was_agreed_is_left_to_a_successor(candidate: Candidate) -> None:
    """The journal has the chain in service, or last in service, and until a Leave what was agreed with the frontend."""
    found = []
    candidate.open()
    candidate.tell(messages.Serve, candidate.connect())
    found.append(journal.AGREED.read(candidate.worker.journal))
    candidate.ask(messages.Swap(candidate.kind.other, replaces=True))
    found.append(journal.AGREED.read(candidate.worker.journal))
    candidate.tell(messages.Leave)
    found.append(journal.AGREED.read(candidate.worker.journal))

    good, other = candidate.kind.good, candidate.kind.other
    assert [(good, True), (other, True), (other, False)] == [
        (each["chain"], each["connect"] is not None) for each in found if each
    ]


def test_a_supervisor_that_is_gone_ends_it(candidate: Candidate) -> None:
    """A worker ends by itself once its supervisor has closed the socket."""
    candidate.open()
    candidate.worker.socket.close()

    assert 0 == candidate.worker.process.wait(10)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_in_whatever_order(candidate: Candidate, seed: int) -> None:
    """After random orders and questions without a pause, the last order is carried out and each question has a reply.

    The conditions that the fixture checks at the end hold here too.
    """
    random = Random(seed)
    candidate.open()
    is_served = False
    for _ in range(60):
        what = random.choice(["order", "order", "pause", "resume", "policy", "swap", "command", "report"])
        match what:
            case "order" if is_served:
                candidate.worker.tell(messages.Leave)
                is_served = False
            case "order":
                candidate.worker.tell(messages.Serve, candidate.connect())
                is_served = True
            case "report":
                candidate.worker.tell(messages.Report)
            case "pause":
                candidate.put(messages.Pause())
            case "resume":
                candidate.put(messages.Resume())
            case "policy":
                candidate.put(messages.SetPolicy(random.choice(["", "enospc=report"])))
            case "command":
                candidate.put(messages.Command("null", "sing", []))
            case "swap":
                chain = random.choice([candidate.kind.good, candidate.kind.other, candidate.kind.unfit])
                candidate.put(messages.Swap(chain, replaces=True))
    standing = candidate.tell(messages.Report)
    candidate.end()

    assert (Stage.SERVING if is_served else Stage.OPEN) == standing.stage
    assert {candidate.kind.good, candidate.kind.other} >= {each.chain for each in candidate.standings}
    assert {""} == {each.failure for each in candidate.standings}
