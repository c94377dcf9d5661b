"""The process that serves one vbd: its start, the messages from the supervisor, its end.

Must not open xenstore, log anywhere but through the supervisor, or outlive it: when the socket closes, the worker
closes its chain and ends. While a supervisor is only restarted, the socket stays open (`supervisor.service.keeper`),
and the next supervisor asks the worker where it stands.

Orders and questions wait for their turn on one line, where each is a generator of steps; `Report` and `Command`, which
change nothing, are answered at once, and so is the end of a measurement. Messages may come while a chain is opened or
closed, because its layers let the loop run when they wait: then a `Command` waits for its turn, too.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import sys
import traceback
from contextlib import suppress
from functools import partial

from xenbackend.disks import parse_disk
from xenbackend.errors import ConfigError, DriverError, KernelError, XenbackendError, sentence_of
from xenbackend.kernel import process, users
from xenbackend.loop.reactor import Reactor
from xenbackend.loop.steps import Line, Steps, run
from xenbackend.protocol import codec, datagrams, messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.walls.raising import Raised, Walls
from xenbackend.worker import birth
from xenbackend.worker.channel import Channel, fits, plain
from xenbackend.worker.disk import is_locked
from xenbackend.worker.measuring import Measuring
from xenbackend.worker.opener import QUESTION_S, OpenerGone, RemoteOpener
from xenbackend.worker.polling import find_permit
from xenbackend.worker.stages import NoChainLeft, Stages

MAX_DESCRIPTORS = 2 + messages.MAX_MEMORIES  # beside one message: the journal, an opener, and memories
LOCK_PAUSE_S = 0.02  # between two tries for a lock that a migrating domain still has
# A verb's errors that are the caller's mistakes: no such layer, no such verb, no such argument.
_MISTAKES = (errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL)


class Worker:
    """Carries out the supervisor's orders and replies to its questions, one after the other, from the loop."""

    def __init__(self, near: socket.socket) -> None:
        """Serve the supervisor at the other end of `near`, a SOCK_SEQPACKET socket."""
        near.setblocking(False)
        self._socket = near
        self._reactor = Reactor(on_bug=self._on_bug)
        self._channel = Channel(near, self._reactor, self._standing)
        self._line = Line()
        self._stages: Stages | None = None  # until `Open` comes
        self._permit = find_permit()  # made now, as later this process can open no file
        self._number = -1  # of the last order
        self._under_way: messages.Order | None = None  # the last order that changes something, until it is carried out
        self._failure, self._errno, self._is_mistake = "", 0, False  # of that order
        self._exchange = ""  # the chain that is being put in
        self._measuring = Measuring(self._reactor, self._channel)
        self._pausing: list[int] = []  # ids of `Pause`, until nothing is in flight
        self._has_ended = False
        self.walls = Raised()  # which ones are up; set before `run`

    def run(self) -> None:
        """Serve until `Close`, or until the supervisor is gone."""
        self._reactor.add(self._socket.fileno(), self._take_message)
        # The data path makes no reference cycles; objects from the start need not be scanned again and again.
        gc.collect()
        gc.freeze()
        try:
            self._reactor.run()
        except Exception as bug:  # the log is where to look for why a worker ended: there is no stderr
            self._on_bug(bug)
            raise
        while self._take_message():  # questions that came meanwhile get their replies, too
            pass

    def _take_message(self) -> bool:
        """Take one message; False if there is none."""
        try:
            datagram, fds, _ = datagrams.receive(self._socket, messages.MAX_MESSAGE, MAX_DESCRIPTORS)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            datagram, fds = b"", []
        if not datagram:
            if not self._has_ended:  # the supervisor is gone
                self._reactor.remove(self._socket.fileno())
                self._take_order(messages.Close(self._number, goes_on=True), [])  # the guest waits for the next one
            return False
        message = codec.from_supervisor(datagram)
        if isinstance(message, messages.Ask):
            self._take_question(message, _opener_of(message, fds))
        elif not isinstance(message, messages.Reply):  # a worker asks nothing, so there are no replies
            self._take_order(message, fds)
        return True

    # where it stands

    def _standing(self) -> messages.Standing:
        stages = self._stages
        if stages is None:
            return messages.Standing(
                self._number,
                Stage.IDLE,
                "",
                read_only=False,
                shareable=False,
                failure=self._failure,
                errno=self._errno,
                is_mistake=self._is_mistake,
                walls=self.walls.up,
                no_walls=self.walls.down,
                needs=self.walls.needs,
            )
        connection = stages.connection
        return messages.Standing(
            number=self._number,
            stage=self._stage(stages),
            walls=self.walls.up,
            no_walls=self.walls.down,
            needs=self.walls.needs,
            chain=stages.chain,
            read_only=stages.order.read_only,
            shareable=stages.order.shareable,
            layers=stages.layers,
            failure=self._failure,
            errno=self._errno,
            is_mistake=self._is_mistake,
            export=stages.export,
            halted=connection.halted if connection else "",
            flush_failed=stages.flush_failed,
            trouble=stages.trouble,
            wants_connections=stages.connector.wants,
            is_paused=stages.is_paused,
        )

    def _stage(self, stages: Stages) -> Stage:
        if isinstance(self._under_way, messages.Serve):
            return Stage.CONNECTING
        if stages.connection is not None or (self._under_way and stages.export):
            return Stage.LEAVING if self._under_way else Stage.SERVING
        return Stage.OPEN if stages.layers else Stage.IDLE

    # orders

    def _take_order(self, order: messages.Order, fds: list[int]) -> None:
        if isinstance(order, messages.Report) and self._exchange:
            self._line.add(self._report(order))  # not before its end: a new service must know the chain
            return
        self._number = order.number
        if isinstance(order, messages.Report):
            if self._stages is not None:
                self._stages.publish_counters()  # the supervisor may look at them next
        else:
            self._under_way, self._failure, self._errno, self._is_mistake = order, "", 0, False
            self._line.add(self._carry_out(order, _opener_of(order, fds), fds))
        self._channel.stand()

    def _report(self, order: messages.Report) -> Steps[None]:
        self._number = max(self._number, order.number)  # a later order may have been taken meanwhile
        self._channel.stand()
        yield from ()

    def _carry_out(self, order: messages.Order, opener: RemoteOpener | None, fds: list[int]) -> Steps[None]:
        """Carry out an order, and say how it went; `fds` are the descriptors beside it, without the opener's."""
        failure, code, is_mistake = "", 0, False
        try:
            if (yield from self._steps_of(order, opener, fds)):
                return  # it is tried again, with its opener
        except OpenerGone:  # the service has gone, too, or logs why: another worker tries again
            os._exit(1)
        except XenbackendError as problem:
            failure, code = plain(str(problem)), getattr(problem, "errno", errno.EINVAL)
            is_mistake = isinstance(problem, ConfigError | DriverError)
        except Exception as bug:  # the supervisor has to know
            self._on_bug(bug)
            failure, code = _of_bug(bug), errno.EIO
        if self._under_way is order:  # else a later order has taken its place
            self._under_way, self._failure, self._errno, self._is_mistake = None, failure, code, is_mistake
        if opener is not None:
            opener.close()
        self._channel.stand()

    def _steps_of(self, order: messages.Order, opener: RemoteOpener | None, fds: list[int]) -> Steps[bool]:
        """Carry out an order; True if it is tried again later."""
        match order:
            case messages.Open() if self._stages is not None:
                raise DriverError("a worker opens one chain in its life", errno=errno.EINVAL)
            case messages.Open() if self.walls.refusal:
                raise DriverError(self.walls.refusal, errno=errno.EPERM)
            case messages.Open():
                _take_name_of(order.vbd)
                self._stages = Stages(order, fds, self._reactor, self._channel, self._on_bug, self._permit)
                self._stages.open(_needed(opener))
            case messages.Serve() if order is self._under_way:  # else a later order has taken its place
                stages = self._opened()
                if self._awaits_lock(stages, order, opener):
                    return True
                yield from stages.serve(order.connect)
            case messages.Leave() if self._stages is not None:
                yield from self._stages.leave()
            case messages.Close():
                yield from self._close(order)
        return False

    def _opened(self) -> Stages:
        """Return the open disk. Raises: DriverError, if nothing was opened or it is closed again."""
        if self._stages is None or self._has_ended:
            raise DriverError("the chain is not open", errno=errno.ENODEV)
        return self._stages

    def _awaits_lock(self, stages: Stages, order: messages.Serve, opener: RemoteOpener | None) -> bool:
        """Open a chain that was only probed; True if somebody else has its lock, and the order comes again soon."""
        try:
            if not stages.is_open:
                stages.open_chain(_needed(opener))
        except OpenerGone:
            raise
        except XenbackendError as problem:
            if not is_locked(problem):
                raise
            again = partial(self._line.add, self._carry_out(order, opener, []))
            self._reactor.call_later(LOCK_PAUSE_S, again)
            return True
        return False

    def _close(self, order: messages.Close) -> Steps[None]:
        self._measuring.give_up()
        try:
            if self._stages is not None:
                yield from self._stages.leave(hands_over=order.hands_over, goes_on=order.goes_on, ends=True)
                self._stages.close()
        finally:  # whatever a layer raises, the process ends
            self._has_ended = True
            self._reactor.stop()

    # questions

    def _take_question(self, ask: messages.Ask, opener: RemoteOpener | None) -> None:
        if isinstance(ask.question, messages.Reconnect) and self._stages is not None and opener is not None:
            self._stages.connector.serve(opener, partial(self._channel.reply, ask.id, Code.OK))
            self._channel.stand()
            return
        steps = self._answer(ask, opener)
        if self._is_done_at_once(ask.question):
            run(steps)
        elif isinstance(ask.question, messages.Measure):
            self._line.add(self._measuring.in_turn(ask.id, steps))
        elif isinstance(ask.question, messages.Swap | messages.Branch) and (reason := self._what_excludes()):
            self._channel.reply(ask.id, Code.BUSY, reason)
            if opener is not None:
                opener.close()
        else:
            self._line.add(steps)

    def _is_done_at_once(self, question: messages.Question) -> bool:
        is_open = self._stages is not None and self._stages.is_open
        return question == messages.Measure(0) or (isinstance(question, messages.Command) and is_open)

    def _what_excludes(self) -> str:
        """Return a sentence about why the chain must not be exchanged now; empty if it may be."""
        if self._exchange:
            return f"the chain is already being exchanged, for {self._exchange}"
        if isinstance(self._under_way, messages.Serve):
            return "the frontend is being connected"
        if self._under_way is not None:
            return "the frontend is being disconnected"
        if self._stages is not None and self._stages.export:
            return "the disk is exported to a device model, not used by the guest's own driver"
        return ""

    def _answer(self, ask: messages.Ask, opener: RemoteOpener | None) -> Steps[None]:
        """Do what was asked, and reply; if nothing is open, the question came too early or too late."""
        if self._stages is None or self._has_ended:
            self._channel.reply(ask.id, Code.GONE, "the chain is not open")
            if opener is not None:
                opener.close()
            return
        try:
            reply = Code.OK, "", (yield from self._do(self._stages, ask, opener))
        except ConfigError as problem:
            reply = Code.INVALID, str(problem), ""
        except (XenbackendError, OSError) as problem:
            reply = Code.FAILED, sentence_of(problem), ""
        except NoChainLeft as problem:
            self._give_up(ask, str(problem))
        except Exception as bug:  # D8; the supervisor is still waiting
            self._on_bug(bug)
            reply = Code.BUG, _of_bug(bug), ""
        if opener is not None:
            opener.close()
        self._channel.stand()  # first: the supervisor must know what has changed when it gets the reply
        code, sentence, data = reply
        if data is not None:
            self._channel.reply(ask.id, code, sentence, data)

    def _do(self, stages: Stages, ask: messages.Ask, opener: RemoteOpener | None) -> Steps[str | None]:
        """Do what a question says, and return the reply's data; None if the reply comes later."""
        match ask.question:
            case messages.Swap() as question:
                return (yield from self._swap(stages, question, _needed(opener)))
            case messages.Branch() as question:
                name = messages.own_snapshot(question.file)
                if name is not None:
                    yield from stages.keep(name)
                    return ""
                return stages.branch(question.file, question.format, _needed(opener))
            case messages.Pause():
                self._pausing.append(ask.id)
                stages.pause(self._has_paused)
                return None
            case messages.Resume():
                stages.resume()
                self._has_paused(Code.FAILED, "the disk was resumed before all requests in flight had ended")
            case messages.SetPolicy() as question:
                stages.set_policy(question.policy)
            case messages.Command() as question:
                return self._control(stages, question)
            case messages.Measure(milliseconds=0):
                self._measuring.end_all()
                return "[]"
            case messages.Measure() as question:
                self._measuring.begin(stages, question.milliseconds / 1000, ask.id)
                return None
        return ""

    def _swap(self, stages: Stages, question: messages.Swap, opener: RemoteOpener) -> Steps[str]:
        self._exchange = question.chain
        try:
            layers = stages.check(question, opener)
            if question.is_dry_run:
                return json.dumps(layers)
            yield from stages.exchange(question.chain, opener, question.order)
        finally:
            self._exchange = ""
        return ""

    def _has_paused(self, code: Code = Code.OK, sentence: str = "") -> None:
        """Reply to each `Pause`: nothing is in flight, unless the sentence says otherwise."""
        pausing, self._pausing = self._pausing, []
        for number in pausing:
            self._channel.stand()
            self._channel.reply(number, code, sentence)

    def _control(self, stages: Stages, command: messages.Command) -> str:
        try:
            data = stages.control(command).decode("latin-1")
        except DriverError as problem:
            if problem.errno in _MISTAKES:
                raise ConfigError(str(problem)) from problem
            raise
        if not fits(data):
            raise ConfigError(f"an answer of {len(data)} bytes is too large; ask for less")
        return data

    def _give_up(self, ask: messages.Ask, sentence: str) -> None:
        """End the process, so that a successor tries again: no chain could be opened."""
        self._channel.alarm(sentence)
        self._channel.reply(ask.id, Code.FAILED, sentence)
        os._exit(1)

    def _on_bug(self, bug: Exception) -> None:
        where = self._stages.count_bug(bug) if self._stages else ""
        self._channel.alarm(f"a bug{f' in {where}' if where else ''}: {''.join(traceback.format_exception(bug))}")


def _opener_of(message: messages.Order | messages.Ask, fds: list[int]) -> RemoteOpener | None:
    """Return the opener whose socket came with a message; None if none came."""
    place = 1 if isinstance(message, messages.Open) else 0
    patience_s = QUESTION_S if isinstance(message, messages.Ask) else None
    return RemoteOpener(socket.socket(fileno=fds.pop(place)), 0, patience_s) if len(fds) > place else None


def _needed(opener: RemoteOpener | None) -> RemoteOpener:
    """Return the opener. Raises: DriverError, if none came."""
    if opener is None:
        raise DriverError("no opener came with it", errno=errno.EINVAL)
    return opener


def _take_name_of(vbd: str) -> None:
    """Name this process after its disk, for others that say who uses an image."""
    with suppress(KernelError, ConfigError):  # nothing depends on it
        process.rename(f"{users.WORKER}{parse_disk(vbd)}")


def _of_bug(bug: Exception) -> str:
    return plain(f"a bug of the worker or a layer: {type(bug).__name__}: {bug}")


def serve(near: socket.socket, walls: Walls, told: birth.Birth) -> int:
    """Serve the vbd whose supervisor is at the other end of `near`, and return the exit status.

    The walls are up before its first message is read.
    """
    raised = birth.close_everything_but(near, walls, told)
    worker = Worker(near)
    birth.raise_walls(walls, told, raised)
    worker.walls = raised
    worker.run()
    return 0


def main(arguments: list[str]) -> int:
    """Serve over the socket whose number is given; return the exit status."""
    given = birth.parse(arguments)
    if given is None:
        print("a worker is started by the service, with --socket and the number of a descriptor", file=sys.stderr)
        return 2
    walls, told = birth.by_exec(given)
    return serve(datagrams.inherited(int(given["socket"])), walls, told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
