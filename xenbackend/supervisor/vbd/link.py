"""The worker of one vbd as the supervisor talks to it: orders by number, questions by id, and what it may say.

Must not know what an order means to a vbd, nor believe a word of the worker's: what it says is handed on only where it
was asked for. Whoever breaks the protocol is killed, and replaced like any worker that dies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.fleet import Fleet, Worker

Then = Callable[[messages.Reply], None]
_MAX_LOG = 4000  # characters of a line


class Owner(Protocol):
    """What hears of the worker. A method that finds the worker's word impossible calls `Link.breach`."""

    def stands(self, standing: messages.Standing, *, is_last: bool) -> None:
        """Take where the worker stands; `is_last`: after the last order that it was given, else before that."""

    def keeps(self, name: str, fd: int) -> bool:
        """Take over a memory's descriptor; False where it is none, or one too many."""

    def drops(self, name: str) -> None:
        """Let go of a memory."""

    def logs(self, level: str, event: str, fields: Mapping[str, str]) -> None:
        """Write a line that the worker asks for."""

    def ends(self, sentence: str) -> None:
        """Take note that the worker has ended; every question has its answer before."""

    def fault(self, bug: Exception) -> None:
        """Take note of a fault of the program while a message of the worker was handled."""


class Link:
    """One vbd's; `worker` is None while there is no process."""

    def __init__(self, owner: Owner, fleet: Fleet, first: int) -> None:
        """Number orders and questions from `first` on, which is larger than any number of an earlier service."""
        self.worker: Worker | None = None
        self._owner = owner
        self._fleet = fleet
        self._first = self._last = first
        self._told = -1  # the number of the last order
        self._asked: dict[int, Then] = {}

    def start(self) -> None:
        """Start a worker. Raises: KernelError."""
        self.worker = self._fleet.start(self._take, self._end)

    def adopt(self, fds: tuple[int, int]) -> None:
        """Go on with a worker that an earlier service started, by its `Worker.descriptors`."""
        self.worker = self._fleet.adopt(fds, self._take, self._end)

    def order(self, make: Callable[[int], messages.Order], fds: Sequence[int] = ()) -> None:
        """Give an order, which `make` returns for its number; nothing where there is no worker."""
        self._last = self._told = self._last + 1
        if self.worker is not None:
            self.worker.send(make(self._told), fds)

    def ask(self, question: messages.Question, then: Then) -> None:
        """Ask, and call `then` with the one reply: the worker's, or one that says that it has ended."""
        self._last += 1
        if self.worker is None:
            then(messages.Reply(self._last, Code.GONE, "there is no worker"))
            return
        self._asked[self._last] = then
        self.worker.send(messages.Ask(self._last, question))

    def breach(self, what: str) -> None:
        """Kill the worker: it said what it was not asked for, or what cannot be."""
        self.kill(f"the worker was killed: {what}", is_breach=True)

    def kill(self, sentence: str, *, is_breach: bool = False) -> None:
        """Kill the worker; the owner gets the sentence when it has ended."""
        if self.worker is not None:
            self.worker.kill(sentence, is_breach=is_breach)

    def let_go(self, sentence: str, *, leaves: bool) -> None:
        """Hear nothing more, and answer every question with `sentence`; with `leaves` the worker goes on."""
        if leaves and self.worker is not None:
            self.worker.leave()
        self.worker = None
        self._answer_all(sentence)

    def _take(self, message: messages.FromWorker, fds: list[int]) -> None:
        try:
            if self.worker is None:
                pass  # it was let go
            elif isinstance(message, messages.Keep) and len(fds) == 1:
                if not self._owner.keeps(message.name, fds.pop()):
                    self.breach("it had kept what is no memory, or one too many")
            elif fds or isinstance(message, messages.Keep):
                self.breach(f"{len(fds)} descriptors came with {type(message).__name__}")
            else:
                self._hear(message)
        except Exception as bug:  # whatever it said to find a fault of ours, the other disks are served on
            self._owner.fault(bug)
            self.breach("it said what the service could not handle")
        while fds:  # none is left in there, or it would be closed twice
            os.close(fds.pop())

    def _hear(self, message: messages.FromWorker) -> None:
        match message:
            case messages.Standing():
                if message.number > self._told:
                    self.breach(f"it answers order {message.number}, which nobody gave")
                else:
                    self._owner.stands(message, is_last=message.number == self._told)
            case messages.Reply():
                self._hear_reply(message)
            case messages.Drop():
                self._owner.drops(message.name)
            case messages.Log():
                fields = {"unsaid": str(message.unsaid)} if message.unsaid else {}
                self._owner.logs(message.level, message.event[:_MAX_LOG], fields)
            case messages.Ask():
                sentence = f"the service knows no {type(message.question).__name__}"
                if self.worker is not None:
                    self.worker.send(messages.Reply(message.id, Code.INVALID, sentence))

    def _hear_reply(self, reply: messages.Reply) -> None:
        then = self._asked.pop(reply.id, None)
        if then is not None:
            then(reply)
        elif reply.id > self._first:  # one of an earlier service's questions may still be answered
            self.breach(f"it answers question {reply.id}, which nobody asked")

    def _end(self, sentence: str) -> None:
        if self.worker is None:
            return  # it was let go
        self.worker = None
        self._answer_all(sentence)
        self._owner.ends(sentence)

    def _answer_all(self, sentence: str) -> None:
        asked, self._asked = self._asked, {}
        for number, then in asked.items():
            then(messages.Reply(number, Code.GONE, sentence))
