"""Processes that are asked for, in a line until they are there: forked by the zygote, or started by exec without it.

Must not be waited for: who asks has a process that it can speak to at once, and is told when that is there.

A worker that is forked costs 8 ms of CPU time, one by exec 50 times as much. So however slow the host is, the line
waits for a zygote that is still being started, and for one that is at work. By exec come those who find none that could
bear them, because it has ended or has not answered for long: a few at a time, as more would only take CPU time from
each other. It has the rest of the line as soon as it answers.
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
REST_S = 5.0  # from the start of a zygote to that of the next one, where it fails
STARTING_S = 60.0  # for a zygote to be ready: it imports everything, 0.4 s of CPU time
ANSWER_S = 10.0  # for it to bear what it was asked for
BY_EXEC = 2  # workers at once that were started so and have said nothing yet ...
BEGINS_S = 10.0  # ... for so long; it may wait for its storage
_PACKAGE = Path(xenbackend.__file__).parent


@dataclass(frozen=True, slots=True)
class Child:
    """A process that is asked for: of which kind, its command line, and what we hold of it."""

    kind: str
    command: Sequence[str]
    process: Process


@dataclass(frozen=True, slots=True)
class Request:
    """Processes that are born together, the first of which says something once it has begun."""

    children: Sequence[Child]
    drivers: Sequence[str]

    def wanted(self) -> list[Child]:
        """Return those that somebody waits for."""
        return [each for each in self.children if each.process.far is not None]


class Births:
    """The line, and the zygote of a service."""

    def __init__(self, loop: Reactor, command: Sequence[str] = ()) -> None:
        """Start nothing yet; `command` is the zygote's. Without one every process is started by exec."""
        self._loop = loop
        self._log = get_logger("births")
        self._command = command
        self._line: deque[Request] = deque()
        self._asked: Request | None = None  # that the zygote is at
        self._zygote: Zygote | None = None
        self._started = 0.0  # when that was
        self._is_late = False  # it has not answered for long
        self._patience = loop.timer(self._has_no_answer)
        self._preparation = loop.timer(self.prepare)
        self._rests = True  # there is no zygote, and none will be there at once
        self._complaint = ""  # why there is none
        self._program = (0, 0)  # that it has imported, see `_program_now`
        self._beginning: list[Process] = []  # workers by exec that have said nothing yet
        self._begins = loop.timer(self._has_begun_late)

    def start(self, children: Sequence[Child], drivers: Sequence[str] = ()) -> None:
        """Have processes born together, in their turn; of the words of third parties' drivers a worker is told first.

        Raises: KernelError, where one has to be started by exec now, and cannot be.
        """
        request = Request(children, drivers)
        self._line.append(request)
        problem = self._go_on()
        if problem is not None and not all(each.process.is_there or each.process.far for each in children):
            raise problem

    def has_begun(self, begun: Process) -> None:
        """Take note that a worker has said something, or has ended."""
        if begun in self._beginning:
            self._beginning.remove(begun)
            self._go_on()

    def prepare(self) -> None:
        """Have a zygote from now on."""
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
        """Have another zygote where the program is not what this one has imported; return whether that is so.

        Who is in the line waits for it.
        """
        if self._zygote is None or self._program == _program_now():
            return False
        self._send_away()
        self._preparation.set(self._loop.now())  # not before whoever wanted it has been served
        return True

    def close(self) -> None:
        """Send the zygote away; who is in the line is never born."""
        self._send_away()
        self._preparation.set(None)
        self._begins.set(None)
        while self._line:
            for each in self._line.popleft().children:
                each.process.give_up("the service ends")

    # the line

    def _go_on(self) -> KernelError | None:
        """Have those born whose turn it is; return what kept the last one from being started."""
        problem = None
        while self._line:
            wanted = self._line[0].wanted()
            if wanted and self._zygote is not None and not self._is_late:
                if not self._zygote.is_ready:
                    break
                self._ask(self._zygote, self._line.popleft(), wanted)
            elif wanted and not (self._rests or self._is_late):
                break  # there is a zygote in a moment
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
        """Go on without a zygote that has been silent for long, until it says something."""
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
        """Put those back at the head of the line whom the zygote has not borne."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._line.appendleft(asked)

    def _rest(self) -> None:
        """Have the next zygote once the last one's start is long ago: one that cannot live keeps no host busy."""
        due = max(self._loop.now(), self._started + REST_S)
        self._rests = due > self._loop.now()
        self._preparation.set(due)


def _program_now() -> tuple[int, int]:
    """Return what tells the installed program from another one: its files, and when the last of them was changed."""
    changed = [0]
    for file in _PACKAGE.rglob("*.py"):
        with suppress(OSError):  # it is being replaced
            changed.append(file.stat().st_ctime_ns)
    return len(changed), max(changed)
