"""How the supervisor talks to the worker of one vbd: orders by number, questions by id, and what the worker may say.

Must not know what an order means to a vbd, nor trust the worker: what it says is passed on only if it was asked for. A
worker that breaks the protocol is killed, and gets a successor like any worker that dies. If only the vbd can tell that
a message is impossible, it calls `Link.breach`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from xenbackend.block.drivers import words_of
from xenbackend.errors import KernelError
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.jobs import Job
from xenbackend.protocol.opening import WAITS_S, Waits
from xenbackend.supervisor.service.fleet import Fleet, Worker
from xenbackend.supervisor.service.opener import OnWaits, Opener
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.openings import Openings

if TYPE_CHECKING:
    from xenbackend.supervisor.vbd.vbd import Vbd

Then = Callable[[messages.Reply], None]
_MAX_LOG = 4000  # characters of a line
_MOST_HANGING = 2  # openers of one disk that should have ended and hang: no other one is started then


class StorageHangs(KernelError):
    """No opener is started for a disk whose storage already makes _MOST_HANGING openers hang."""

    def __init__(self) -> None:
        super().__init__(f"open its files: its storage has failed to answer {_MOST_HANGING} times", errno.ETIMEDOUT)


class Link:
    """The link to the worker of one vbd.

    worker       None while there is no process
    waits_since  since when the worker's opener has waited, by the loop's clock; None: it does not wait
    waits_for    what for: "storage" that does not answer, or a "key" that is being made; empty: it does not wait
    """

    def __init__(self, vbd: Vbd, fleet: Fleet, openings: Openings) -> None:
        """Begin to number orders and questions, with larger numbers than any earlier service."""
        first = int(fleet.loop.now() * 1e6)  # from a clock that cannot be set back
        self.worker: Worker | None = None
        self.waits_since: float | None = None
        self.waits_for = ""
        self._vbd = vbd
        self._fleet = fleet
        self._first = self._last = first
        self._told = -1  # the number of the last order
        self._asked: dict[int, Then] = {}
        self._asked_with: dict[int, Opener] = {}  # of questions that may open something
        self._openings = openings
        self._openers: list[Opener] = []
        self._reconnects: Opener | None = None  # the one for the last `Reconnect`, until it has ended

    def start(self, chain: str = "") -> Worker:
        """Start and return a worker, which first gets what it needs for the drivers of a chain and cannot get later.

        Raises: KernelError; StorageHangs, if openers of earlier workers hang, as this one's would.
        """
        self._check_hanging()
        self.worker = worker = self._fleet.start(self._take, self._end, words_of(chain))
        return worker

    def _check_hanging(self) -> None:
        """Raise StorageHangs if _MOST_HANGING openers hang."""
        if sum(opener.hangs() for opener in self._openers) >= _MOST_HANGING:
            raise StorageHangs

    def _check_reconnects(self) -> None:
        """Raise KernelError if the opener for the last `Reconnect` is still there: a worker wants one when it likes."""
        if self._reconnects is not None and not self._reconnects.hangs():
            raise KernelError("connect again while the former opener has not ended", errno.EBUSY)

    def adopt(self, fds: tuple[int, int]) -> None:
        """Adopt a worker that an earlier service started, by its `Worker.descriptors`."""
        self.worker = self._fleet.adopt(fds, self._take, self._end)

    def order(self, make: Callable[[int], messages.Order], fds: Sequence[int] = ()) -> None:
        """Give the order that `make` returns for a number. Without a worker nothing is sent.

        If it may open something, an opener's socket goes beside it, after the first of `fds`. Raises: KernelError, if
        there is no opener, or if such an order cannot be sent.
        """
        self._last = self._told = self._last + 1
        if self.worker is None:
            return
        order = make(self._told)
        if isinstance(order, messages.Close) and not self.worker.is_there:
            self.kill("the worker was no longer needed")
            return
        job = self._openings.for_order(order) if isinstance(order, messages.Open | messages.Serve) else None
        try:
            self._send(order, fds, job, self._wait)
        except KernelError as error:
            if job is not None:
                raise
            self.kill(f"the worker was killed: {error}")  # it would never do what was ordered

    def ask(self, question: messages.Question, then: Then) -> None:
        """Ask a question, and call `then` with the one reply: the worker's, or one that says why there is none."""
        self._last += 1
        if self.worker is None:
            then(messages.Reply(self._last, Code.GONE, "there is no worker"))
            return
        self._asked[self._last] = then
        try:
            job = self._openings.for_question(question)
            if job is not None:
                self._check_hanging()
            if job is not None and job.only_connects:
                self._check_reconnects()
            opener = self._send(messages.Ask(self._last, question), [], job)
            if opener is not None:
                self._asked_with[self._last] = opener
            if job is not None and job.only_connects:
                self._reconnects = opener
        except KernelError as error:
            self._asked.pop(self._last)
            then(messages.Reply(self._last, Code.FAILED, str(error)))

    def hear(self) -> None:
        """Handle what the worker and its openers have said, and the worker's end, before the loop comes to that."""
        for opener in list(self._openers):
            opener.hear()
        if self.worker is not None:
            self.worker.hear()

    def breach(self, what: str) -> None:
        """Kill the worker, because it said something that it was not asked for, or that is impossible."""
        self.kill(f"the worker was killed: {what}", is_breach=True)

    def kill(self, sentence: str, *, is_breach: bool = False) -> None:
        """Kill the worker; the vbd gets the sentence when it has ended."""
        if self.worker is not None:
            self.worker.kill(sentence, is_breach=is_breach)

    def let_go(self, sentence: str, *, leaves: bool) -> None:
        """Listen no more, and answer every open question with `sentence`; with `leaves` the worker goes on."""
        if leaves and self.worker is not None:
            self.worker.leave()
            for opener in list(self._openers):
                opener.leave()
            self._openers.clear()
        self.worker = None
        self._dismiss_openers()
        self._answer_all(sentence)

    def _send(
        self, message: messages.FromSupervisor, fds: Sequence[int], job: Job | None, on_waits: OnWaits = lambda _: None
    ) -> Opener | None:
        """Send a message. For a job, start and return an opener, whose socket goes beside it. Raises: KernelError."""
        worker = self.worker
        assert worker is not None  # noqa: S101 - the caller has checked
        if job is None:
            worker.send(message, fds)
            return None
        openings = self._openings
        on_end = partial(self._opener_ended, worker)
        on_found = partial(openings.found, message.question if isinstance(message, messages.Ask) else None)
        opener, near = self._fleet.open(job, openings.kept(), on_found, on_end, on_waits)
        self._openers.append(opener)
        if worker.is_boosted:
            opener.boost()
        with near:
            worker.send(message, [*fds[:1], near.fileno(), *fds[1:]])
        return opener

    def _opener_ended(self, worker: Worker, opener: Opener, breach: str) -> None:
        self._openers.remove(opener)
        if opener is self._reconnects:
            self._reconnects = None
        if breach and worker is self.worker:  # else that worker has gone already, and its successor is not at fault
            self.breach(breach)

    def _wait(self, waits: Waits) -> None:
        """Note that a file's storage does not answer, or that a key is being made, or that this is over."""
        self.waits_since = self._fleet.loop.now() - WAITS_S if waits.name else None
        self.waits_for = ("key" if waits.makes_key else "storage") if waits.name else ""
        self._vbd.handle(events.Waits(waits.name, waits.makes_key))

    def _dismiss_openers(self) -> None:
        """Kill the openers of a worker that has ended. One that hangs ends when its storage answers."""
        self.waits_since, self.waits_for = None, ""
        for opener in list(self._openers):
            opener.kill()

    def _take(self, message: messages.FromWorker) -> None:
        if self.worker is None:
            return  # `let_go` was called
        try:
            self._hear(message)
        except Exception as bug:  # even if its message hits a bug of ours, the other disks must be served
            self._vbd.fault(bug)
            self.breach("it sent a message that the service could not handle")

    def _hear(self, message: messages.FromWorker) -> None:
        match message:
            case messages.Standing():
                self._hear_standing(message)
            case messages.Reply():
                self._hear_reply(message)
            case messages.Drop():
                self._vbd.handover.drop(message.name)
            case messages.Disconnected():
                self._vbd.handover.connections.has_closed(message.server, message.place, message.inode)
            case messages.Log():
                fields = {"unsaid": str(message.unsaid)} if message.unsaid else {}
                self._vbd.log.say_for_worker(message.level, message.event[:_MAX_LOG], **fields)
            case messages.Ask():
                sentence = f"the service knows no {type(message.question).__name__}"
                if self.worker is not None:
                    with suppress(KernelError):  # no worker of ours asks anything yet
                        self.worker.send(messages.Reply(message.id, Code.INVALID, sentence))

    def _hear_standing(self, standing: messages.Standing) -> None:
        if standing.number > self._told:
            self.breach(f"it answers order {standing.number}, which nobody gave")
            return
        export = self._openings.believed_export(standing.export)
        if export is None:
            self.breach("it says that it serves a device model at a path that nobody named")
            return
        if self.worker is not None and not self.worker.note_walls(standing):
            return
        self._vbd.stands(replace(standing, export=export), is_last=standing.number == self._told)

    def _hear_reply(self, reply: messages.Reply) -> None:
        then, opener = self._asked.pop(reply.id, None), self._asked_with.pop(reply.id, None)
        if opener is not None:
            opener.note_over()
        if then is not None:
            then(reply)
        elif reply.id > self._first:  # one of an earlier service's questions may still be answered
            self.breach(f"it answers question {reply.id}, which nobody asked")

    def _end(self, sentence: str) -> None:
        worker, self.worker = self.worker, None
        if worker is None:
            return  # `let_go` was called
        self._dismiss_openers()
        self._answer_all(sentence)
        self._vbd.ends(worker, sentence)

    def _answer_all(self, sentence: str) -> None:
        asked, self._asked = self._asked, {}
        self._asked_with.clear()
        for number, then in asked.items():
            then(messages.Reply(number, Code.GONE, sentence))
