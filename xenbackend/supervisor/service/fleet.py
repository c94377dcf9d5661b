"""Worker processes, our own and adopted ones: how they are started, talked to, ended and reaped.

Must not know xenstore, nor what a message means to a vbd.

A worker is never forked from here (`births`). It can be talked to before its process is there, and so can an opener; a
worker's first opener is started together with it. A worker gets one end of a datagram socket pair, over which the
messages of `xenbackend.protocol.messages` travel, with descriptors beside them.

What a worker sends is as hostile as what a guest writes. A datagram that is no message of a worker's, is too long, or
has descriptors beside it is a breach of the protocol: the worker is killed, nothing else that it has sent is looked at,
and its end is reported like any other. The kernel drops the descriptors, which this process never gets: closing one
that hanging storage stands behind would stop all disks.
"""

from __future__ import annotations

import errno
import math
import select
import socket
import sys
from collections.abc import Callable, Mapping, Sequence, Set

from xenbackend.block.driver import NEEDS
from xenbackend.budget import Bucket
from xenbackend.errors import KernelError
from xenbackend.kernel.process import is_ending
from xenbackend.log import get_logger
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, datagrams, jobs, messages
from xenbackend.supervisor.service import births
from xenbackend.supervisor.service.births import Births, Child
from xenbackend.supervisor.service.opener import OnEnd as OnOpenerEnd
from xenbackend.supervisor.service.opener import OnFound, OnWaits, Opener
from xenbackend.supervisor.service.openers import Openers
from xenbackend.supervisor.service.process import Process
from xenbackend.walls.raising import Wall, describe

COMMAND = (sys.executable, "-m", "xenbackend.worker.main")
OPENER = (sys.executable, "-m", "xenbackend.opener.main")
HANG_UP_S = 5.0  # for a worker that has closed its socket to end
_LINES = 10, 600.0  # about walls, which a worker can provoke: at once, and seconds for one more
_LONGEST_REASON = 500  # characters of the reason why a wall is not up
_MESSAGES_PER_TURN, _TURN_S = 64, 0.02  # of each pass of the loop: a worker that says much must not hold up others
_LAST_MESSAGES = 1024  # of a worker that has ended: more than its socket holds

OnMessage = Callable[[messages.FromWorker], None]
OnEnd = Callable[[str], None]


class Worker:
    """One process that serves a vbd.

    has_broken_protocol      whether it is or was killed for that
    walls, no_walls, needs   its walls, as it says itself: see `messages.Standing`
    """

    def __init__(self, fleet: Fleet, started: Process, on_message: OnMessage, on_end: OnEnd) -> None:
        """Listen to it from now on."""
        self._fleet = fleet
        self._loop = fleet.loop
        self._process = started
        self._on_message = on_message
        self._on_end = on_end
        self._why_killed = ""
        self.walls: list[str] = []
        self.no_walls: dict[str, str] = {}
        self.needs: list[str] = []
        self._has_told_walls = False
        self.is_boosted = False
        self.has_broken_protocol = False
        self._is_heard = self._is_held = True  # we listen; it is ours
        self._closes = False  # it was told to close
        self._overdue = self._loop.timer(self._has_not_ended)
        started.watch(self._loop, self._reap)
        try:
            self._loop.add(started.socket.fileno(), self._receive)
        except OSError:
            started.unwatch()
            raise

    @property
    def pid(self) -> int:
        """The process number, for people; 0 before the process is there."""
        return self._process.pid

    @property
    def is_there(self) -> bool:
        """Whether there is a process. Until then it has done nothing, and messages to it wait in the socket."""
        return self._process.is_there

    @property
    def descriptors(self) -> tuple[int, int]:
        """The socket and the pidfd, by which another service can adopt it, once it is there."""
        return self._process.socket.fileno(), self._process.pidfd

    def when_there(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the process is there, before it hears anything; at once if it is there already."""
        self._process.when_there(callback)

    def send(self, message: messages.FromSupervisor, fds: Sequence[int] = ()) -> None:
        """Send a message. A worker that does not read is killed: it would never do what was asked.

        Raises: KernelError, if the host could not take the message; then the worker has not received it.
        """
        self._closes |= isinstance(message, messages.Close)
        try:
            socket.send_fds(self._process.socket, [codec.encode(message)], list(fds))
        except BlockingIOError:
            self.kill("the worker was killed: it did not read its messages")
        except ConnectionError:
            pass  # it is ending; `_reap` will tell
        except OSError as error:
            raise KernelError(f"send {type(message).__name__} to a worker", error.errno or errno.EIO) from None

    def hear(self) -> None:
        """Handle what it has sent, and its end, before the loop comes to that."""
        if _has_ended(self._process.pidfd):
            self._reap()
        else:
            self._receive(_LAST_MESSAGES)

    def kill(self, sentence: str, *, is_breach: bool = False) -> None:
        """Kill the process; `on_end` gets the sentence once it is gone.

        `is_breach`: it broke the protocol. That is counted, and no more of its messages are handled.
        """
        if is_breach and self._is_heard:
            self._deafen()
            self._note_breach()
        self._why_killed = self._why_killed or sentence
        self._process.kill()

    def boost(self) -> None:
        """Give it priority over the rest of the host until `unboost`, because a guest waits for it."""
        self.is_boosted = True
        self._process.boost()

    def unboost(self) -> None:
        """Give it the priority of any other process again."""
        self.is_boosted = False
        self._process.unboost()

    def note_walls(self, standing: messages.Standing) -> bool:
        """Note which walls it says it is behind; False: no worker is, and it is killed.

        Walls are up before a worker says anything, so that each of its standings tells the same.
        """
        no_walls = {wall: why[:_LONGEST_REASON] for wall, why in standing.no_walls.items()}
        said = (standing.walls, no_walls, standing.needs)
        if self._has_told_walls:
            is_sound = said == (self.walls, self.no_walls, self.needs)
        else:
            walls = [*standing.walls, *no_walls]
            is_sound = _are_of(walls, {wall.value for wall in Wall}) and _are_of(standing.needs, NEEDS)
        if not is_sound:
            self._breach("walls other than a worker's, or than it has told before")
        elif not self._has_told_walls:
            self._has_told_walls = True
            self.walls, self.no_walls, self.needs = said
            self._fleet.note_walls(no_walls)
        return is_sound

    def leave(self) -> None:
        """Close our ends; the worker goes on, and the keeper has its socket for the next service."""
        if self._is_held:
            self._let_go()
            self._process.leave()

    def _breach(self, what: str) -> None:
        self.kill(f"the worker was killed: it broke the protocol: {what}", is_breach=True)

    def _note_breach(self) -> None:
        self.has_broken_protocol = True
        self._fleet.breaches += 1

    def _let_go(self) -> None:
        self._is_held = False
        self._overdue.set(None)
        self._deafen()
        self._process.unwatch()
        self._fleet.has_begun(self._process)

    def _deafen(self) -> None:
        if self._is_heard:
            self._is_heard = False
            self._loop.remove(self._process.socket.fileno())

    def _hear_no_more(self) -> None:
        """Expect the end of a worker that has closed its socket, since it cannot be told anything any more."""
        self._deafen()
        self._overdue.set(self._loop.now() + HANG_UP_S)

    def _has_not_ended(self) -> None:
        """Kill a worker that has closed its socket, unless it was told to close.

        A slow close is none of its faults: the limit of the vbd's phase ends it, or the kernel, once nothing is in
        flight. One that is ending, or of which nobody can tell, has broken no protocol.
        """
        if self._closes:
            return
        if self._why_killed or is_ending(self.pid):
            self._process.kill()
        else:
            self._note_breach()
            self.kill("the worker was killed: it closed its socket, and did not end")

    def _receive(self, most: int = _MESSAGES_PER_TURN, turn_s: float = _TURN_S) -> None:
        """Read what the worker has sent, at most so many messages and for about so long, and pass it on.

        The loop calls this again for what is left.
        """
        self._fleet.has_begun(self._process)
        end = self._loop.now() + turn_s
        for _ in range(most):
            if not self._is_heard:
                return  # it was left, or broke the protocol
            try:
                datagram, _, is_whole = datagrams.receive(self._process.socket, messages.MAX_MESSAGE, 0)
            except BlockingIOError:
                return
            except OSError:
                self._hear_no_more()
                return
            if not is_whole:
                self._breach("a datagram that is too long, or has descriptors beside it")
            elif datagram:
                self._take(datagram)
            elif _has_hung_up(self._process.socket):
                self._hear_no_more()
            else:
                self._breach("an empty datagram")
            if self._loop.now() >= end:
                return

    def _take(self, datagram: bytes) -> None:
        try:
            message = codec.from_worker(datagram)
        except codec.NotAMessage as problem:
            self._breach(str(problem))
            return
        try:
            self._on_message(message)
        except Exception as bug:  # this message alone is lost; the next one is handled
            self._loop.bug(bug)

    def _reap(self) -> None:
        """Handle the last messages, collect the exit status, close everything, and call `on_end`."""
        self._receive(_LAST_MESSAGES, math.inf)
        if self._is_held:
            self._let_go()
            sentence = self._process.describe_end()
            self._on_end(self._why_killed or sentence)


class Fleet:
    """All worker processes of this service.

    breaches    how many workers were killed because they broke the protocol
    openers     the openers that work for them
    """

    def __init__(
        self,
        loop: Reactor,
        command: Sequence[str] = COMMAND,
        zygote: Sequence[str] = (),
        opener: Sequence[str] = OPENER,
    ) -> None:
        """Start nothing yet; the command lines of a worker, a zygote and an opener are without ``--socket``.

        Without the zygote's, every process is started by exec.
        """
        self.loop = loop
        self.log = get_logger("fleet")
        self._wall_lines = Bucket(*_LINES, loop.now)
        self.breaches = 0
        self._command = command
        self._opener_command = opener
        self.openers = Openers(loop, self.start_opener, self.log)
        self._births = Births(loop, zygote)
        self.has_begun, self.prepare = self._births.has_begun, self._births.prepare
        self._missing_walls = ""  # as last said

    def start(self, on_message: OnMessage, on_end: OnEnd, drivers: Sequence[str] = ()) -> Worker:
        """Start a worker for a chain of these drivers, and perhaps an opener for `open`.

        Raises: KernelError.
        """
        kinds = [births.WORKER, *([births.OPENER] if self.openers.want_spare else [])]
        worker, *openers = self._start(kinds, drivers)
        self.openers.spare = openers[0] if openers else self.openers.spare
        try:
            return Worker(self, worker, on_message, on_end)
        except OSError as error:
            worker.kill()
            worker.wait()
            self.has_begun(worker)  # so that it does not count among those that begin
            raise KernelError("watch a worker process", error.errno or errno.EIO) from None

    def open(
        self,
        job: jobs.Job,
        kept: Sequence[int],
        on_found: OnFound,
        on_end: OnOpenerEnd,
        on_waits: OnWaits = lambda _: None,
    ) -> tuple[Opener, socket.socket]:
        """Have an opener do a job when it is its turn; return it with the socket that its worker is to get.

        Raises: KernelError.

        `kept` are the descriptors of what the job has kept; they stay the caller's.
        """
        return self.openers.open(job, kept, on_found, on_end, on_waits)

    def start_opener(self) -> Process:
        """Start an opener that has no job yet. Raises: KernelError."""
        return self._start([births.OPENER])[0]

    def _start(self, kinds: Sequence[str], drivers: Sequence[str] = ()) -> list[Process]:
        """Have processes started together. Raises: KernelError; then none of them is left."""
        words = ["--drivers", ",".join(drivers)] if drivers else []
        commands = {births.WORKER: [*self._command, *words], births.OPENER: self._opener_command}
        children: list[Child] = []
        try:
            for kind in kinds:
                children.append(Child(kind, commands[kind], Process.to_come()))  # noqa: PERF401 - each may fail
            self._births.start(children, drivers)
        except KernelError:
            for each in children:
                each.process.kill()
                each.process.wait()
            raise
        return [each.process for each in children]

    def adopt(self, fds: tuple[int, int], on_message: OnMessage, on_end: OnEnd) -> Worker:
        """Adopt a worker that an earlier service started, by its `Worker.descriptors`.

        Raises: OSError, if the host cannot watch them; then they stay the caller's.
        """
        near = socket.socket(fileno=fds[0])
        try:
            return Worker(self, Process(near, fds[1]), on_message, on_end)
        except OSError:
            near.detach()
            raise

    def note_walls(self, no_walls: Mapping[str, str]) -> None:
        """Log which walls this host cannot raise around workers, and why; the same only once.

        A worker says so itself, and each may say something else: the lines have a budget.
        """
        missing = describe(no_walls) if no_walls else ""
        if missing and missing != self._missing_walls and self._wall_lines.take() is not None:
            self._missing_walls = missing
            self.log.warning("workers are not behind all of their walls", missing=missing)

    def renew(self) -> None:
        """Have processes that are started from now on run the program that is installed now."""
        if self._births.renew():
            self.openers.drop_spare()

    def close(self) -> None:
        """End the zygote, and the openers that are left; no worker of ours is left.

        Openers that hang are waited for together, however many they are.
        """
        self._births.close()
        self.openers.close()


def _are_of(names: Sequence[str], known: Set[str]) -> bool:
    """Return whether all names are known ones, each there at most once."""
    return len(names) == len(set(names)) and set(names) <= known


def _has_ended(pidfd: int) -> bool:
    """Return whether a process has ended, by its pidfd; -1: there is none."""
    poll = select.poll()
    if pidfd >= 0:
        poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _has_hung_up(near: socket.socket) -> bool:
    """Return whether the other end is closed; an empty datagram would read the same."""
    poll = select.poll()
    poll.register(near, select.POLLIN)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
