"""The line of processes that are to be started: the zygote forks them, or they are started by exec without it.

Must not make anybody wait: the caller has a process that it can talk to at once, and is told when that is there.

A forked worker costs 8 ms of CPU time, one started by exec 50 times as much. So however slow the host is, the line
waits for a zygote that is being started or at work. A process is started by exec only if there is no zygote that could
fork it, because the zygote has ended or has not answered for long. A few at a time are started so, as more would only
take CPU time from each other. As soon as the zygote answers, it gets the rest of the line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xenbackend
from xenbackend.errors import KernelError
from xenbackend.log import get_logger
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service import process
from xenbackend.supervisor.service.process import Process
from xenbackend.supervisor.service.zygote import Zygote

WORKER, OPENER = "w", "o"  # kinds, as `worker.zygote` knows them
REST_S = 5.0  # from the start of a zygote that fails to that of the next one
STARTING_S = 60.0  # for a zygote to be ready: it imports everything, 0.4 s of CPU time
ANSWER_S = 10.0  # for it to fork what it was asked for
BY_EXEC = 2  # most workers at once that were started by exec and have said nothing yet ...
BEGINS_S = 10.0  # ... which counts for so long: they may wait for their storage
_PACKAGE = Path(xenbackend.__file__).parent


@dataclass(frozen=True, slots=True)
class Child:
    """A process that is to be started: its kind, its command line, and our hold on it."""

    kind: str
    command: Sequence[str]
    process: Process


@dataclass(frozen=True, slots=True)
class Request:
    """Processes that are started together. The first one says something once it has begun."""

    children: Sequence[Child]
    drivers: Sequence[str]

    def wanted(self) -> list[Child]:
        """Return the processes that somebody still waits for."""
        return [each for each in self.children if each.process.far is not None]


class Births:
    """The line, and the zygote of a service."""

    def __init__(self, loop: Reactor, command: Sequence[str] = ()) -> None:
        """Start nothing yet; `command` is the zygote's. Without it every process is started by exec."""
        self._loop = loop
        self._log = get_logger("births")
        self._command = command
        self._line: deque[Request] = deque()
        self._asked: Request | None = None  # that the zygote works on
        self._zygote: Zygote | None = None
        self._started = 0.0  # when the last zygote was started
        self._is_late = False  # the zygote has not answered for long
        self._patience = loop.timer(self._has_no_answer)
        self._preparation = loop.timer(self.prepare)
        self._rests = True  # there is no zygote, and none is about to be there
        self._complaint = ""  # why there is no zygote
        self._program = (0, 0)  # that the zygote has imported, see `_program_now`
        self._beginning: list[Process] = []  # workers by exec that have said nothing yet
        self._begins = loop.timer(self._has_begun_late)

    def start(self, children: Sequence[Child], drivers: Sequence[str] = ()) -> None:
        """Have processes started together, in their turn. A worker is for a chain of these drivers.

        Raises: KernelError, if a process has to be started by exec now, and cannot be.
        """
        request = Request(children, drivers)
        self._line.append(request)
        problem = self._go_on()
        if problem is not None and not all(each.process.is_there or each.process.far for each in children):
            raise problem

    def has_begun(self, begun: Process) -> None:
        """Note that a worker has said something, or has ended."""
        if begun in self._beginning:
            self._beginning.remove(begun)
            self._go_on()

    def prepare(self) -> None:
        """Start a zygote, if there is none."""
        if self._zygote is not None or not self._command:
            return
        self._program, self._started = _program_now(), self._loop.now()
        try:
            self._zygote = Zygote(self._loop, self._command, self._has_changed)
        except KernelError as error:
            if str(error) != self._complaint:
                self._log.warning(str(error))
            self._complaint = str(error)
            self._rest()
            self._go_on()
        else:
            self._complaint = ""
            self._rests = False
            self._patience.set(self._started + STARTING_S)

    def renew(self) -> bool:
        """Replace the zygote if it has imported another program than the installed one; return whether it is replaced.

        The line waits for the new one.
        """
        if self._zygote is None or self._program == _program_now():
            return False
        self._send_away()
        self._preparation.set(self._loop.now())  # not before the caller is done
        return True

    def close(self) -> None:
        """End the zygote. Processes that are still in the line are never started."""
        self._send_away()
        self._preparation.set(None)
        self._begins.set(None)
        while self._line:
            for each in self._line.popleft().children:
                each.process.give_up("the service ends")

    # the line

    def _go_on(self) -> KernelError | None:
        """Start the processes whose turn it is; return why the last one could not be started."""
        problem = None
        while self._line:
            wanted = self._line[0].wanted()
            if wanted and self._zygote is not None and not self._is_late:
                if not self._zygote.is_ready:
                    break
                self._ask(self._zygote, self._line.popleft(), wanted)
            elif wanted and not (self._rests or self._is_late):
                break  # there will be a zygote in a moment
            elif wanted and len(self._beginning) >= BY_EXEC:
                break
            else:
                self._line.popleft()
                problem = self._exec(wanted)
        return problem

    def _ask(self, zygote: Zygote, request: Request, wanted: Sequence[Child]) -> None:
        self._asked = request
        self._patience.set(self._loop.now() + ANSWER_S)
        kinds, drivers = "".join(each.kind for each in wanted), request.drivers
        zygote.ask(kinds, drivers, [each.process for each in wanted])
        if zygote.is_over:
            self._has_changed()

    def _exec(self, wanted: Sequence[Child]) -> KernelError | None:
        try:
            for each in wanted:
                process.start_as(each.process, each.command)
        except KernelError as error:
            for each in wanted:
                each.process.kill()
            return error
        if wanted and wanted[0].kind == WORKER:  # an opener says nothing before it is asked
            self._beginning.append(wanted[0].process)
            self._begins.set(self._loop.now() + BEGINS_S)
        return None

    def _has_begun_late(self) -> None:
        self._beginning.clear()
        self._go_on()

    # the zygote

    def _has_changed(self) -> None:
        """Go on once the zygote is ready, or has failed."""
        zygote = self._zygote
        if zygote is None:
            return
        self._is_late = False
        if zygote.is_over:
            self._send_away()
            self._rest()
        else:
            self._asked = None
            self._patience.set(None)
        self._go_on()

    def _has_no_answer(self) -> None:
        """Go on without a zygote that has been silent for long, until it answers."""
        self._is_late = True
        if self._zygote is not None:
            self._zygote.forget()
            sentence = "the zygote does not answer; until it does, workers are started without it, a few at a time"
            self._log.warning(sentence, zygote=self._zygote.pid)
        self._take_back()
        self._go_on()

    def _send_away(self) -> None:
        self._patience.set(None)
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            zygote.close()
        self._take_back()
        self._is_late = False

    def _take_back(self) -> None:
        """Put back what the zygote has not forked, at the head of the line."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._line.appendleft(asked)

    def _rest(self) -> None:
        """Start the next zygote REST_S after the last one, so that one that cannot live does not keep the host busy."""
        due = max(self._loop.now(), self._started + REST_S)
        self._rests = due > self._loop.now()
        self._preparation.set(due)


def _program_now() -> tuple[int, int]:
    """Return what identifies the installed program: the number of its files, and when the last of them was changed."""
    changed = [0]
    for file in _PACKAGE.rglob("*.py"):
        with suppress(OSError):  # it is being replaced
            changed.append(file.stat().st_ctime_ns)
    return len(changed), max(changed)
