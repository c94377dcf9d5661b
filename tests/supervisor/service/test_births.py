"""The queue of processes that have been asked for: each of them gets its turn, however slow the host is."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.supervisor.helpers import NEVER_READY, run_until, settle
from xenbackend.errors import KernelError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, messages
from xenbackend.supervisor.service.births import (
    ANSWER_S,
    BEGINS_S,
    BY_EXEC,
    OPENER,
    REST_S,
    STARTING_S,
    WORKER,
    Births,
    Child,
)
from xenbackend.supervisor.service.process import Process
from xenbackend.supervisor.service.zygote import COMMAND

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]

REAL = (*COMMAND, "--host", "xenbackend.rig.host")
WAITS = (sys.executable, "-I", "-S", "-c", "import socket, sys; socket.socket(fileno=int(sys.argv[2])).recv(1)")


class Line:
    """A queue with its loop, and all processes that were asked for."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.ahead_s = 0.0  # how far the loop's clock is ahead
        self.loop = Reactor(lambda: time.monotonic() + self.ahead_s)
        self.births = Births(self.loop, command)
        self.asked: list[Process] = []

    @property
    def zygote(self) -> int:
        """The zygote's process number, or 0 if there is none."""
        return self.births._zygote.pid if self.births._zygote else 0

    def prepare(self) -> None:
        """Start a zygote, and wait until it is ready."""
        self.births.prepare()
        self.until(lambda: self.births._zygote is not None and self.births._zygote.is_ready)

    def start(self, kinds: str = WORKER, command: tuple[str, ...] = WAITS) -> list[Process]:
        """Ask for processes."""
        children = [Child(kind, command, Process.to_come()) for kind in kinds]
        self.asked += [each.process for each in children]
        self.births.start(children)
        return [each.process for each in children]

    def until(self, condition: Callable[[], object]) -> None:
        """Let the loop run until the condition holds."""
        run_until(self.loop, condition)

    def pass_time(self, seconds: float) -> None:
        """Move the clock ahead, and do what is due then."""
        self.ahead_s += seconds
        settle(self.loop)

    def there(self) -> list[bool]:
        """Return for each process that was asked for whether it exists."""
        return [each.is_there for each in self.asked]

    def is_forked(self, process: Process) -> bool:
        """Return whether the zygote has forked a process."""
        return COMMAND[-1] in Path(f"/proc/{process.pid}/cmdline").read_text()

    def close(self) -> None:
        for each in self.asked:
            each.kill()
            each.describe_end()
        if self.zygote:
            os.kill(self.zygote, signal.SIGCONT)
        self.births.close()
        self.loop.close()


@pytest.fixture
def line(descriptors: None) -> Iterator[Callable[..., Line]]:
    """Return a maker of queues."""
    made: list[Line] = []

    def make(command: tuple[str, ...] = REAL) -> Line:
        made.append(Line(command))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_without_a_zygote_s_command_they_come_at_once(line: Callable[..., Line]) -> None:
    """Without a command for a zygote, all processes of a request are started at once, by exec."""
    it = line(())
    worker, opener = it.start("wo")

    assert [True, True] == it.there()
    assert not it.is_forked(worker)
    assert not it.is_forked(opener)


def test_who_comes_while_the_zygote_is_being_started_waits_for_it(line: Callable[..., Line]) -> None:
    """Processes that are asked for while the zygote is being started wait for it and are forked in order, however long
    that takes: to start one by exec would take as long.
    """
    it = line()
    it.births.prepare()
    os.kill(it.zygote, signal.SIGSTOP)
    for _ in range(5):
        it.start()
    it.pass_time(STARTING_S - 1)
    assert [False] * 5 == it.there()
    order: list[int] = []
    for number, each in enumerate(it.asked):
        each.when_there(lambda number=number: order.append(number))
    os.kill(it.zygote, signal.SIGCONT)
    it.until(lambda: all(it.there()))

    assert [0, 1, 2, 3, 4] == order
    assert all(it.is_forked(each) for each in it.asked)


def test_a_host_a_hundred_times_slower_is_served_by_forks(line: Callable[..., Line]) -> None:
    """If a fork takes 100 times as long as here, no process is started by exec, and none is lost."""
    it = line()
    it.prepare()
    os.kill(it.zygote, signal.SIGSTOP)
    for _ in range(12):
        it.start("wo")
    it.pass_time(100 * 0.05)
    assert [False] * 24 == it.there()
    os.kill(it.zygote, signal.SIGCONT)
    it.until(lambda: all(it.there()))

    assert all(it.is_forked(each) for each in it.asked)


def test_a_zygote_that_does_not_answer_is_in_nobodys_way(line: Callable[..., Line], lines: io.StringIO) -> None:
    """If the zygote does not answer in time, workers are started by exec, a few at a time, and the next one as soon as
    one has begun. Once the zygote answers, it forks the others; a process that it forks too late has received no
    message, and ends.
    """
    it = line()
    it.prepare()
    os.kill(it.zygote, signal.SIGSTOP)
    for _ in range(BY_EXEC + 4):
        it.start()
    it.pass_time(ANSWER_S)
    assert [True] * BY_EXEC + [False] * 4 == it.there()
    it.births.has_begun(it.asked[0])
    assert [True] * (BY_EXEC + 1) + [False] * 3 == it.there()
    it.births.has_begun(it.asked[0])
    it.pass_time(BEGINS_S)
    assert 1 == it.there().count(False), "each that hangs keeps others waiting for a while only"
    os.kill(it.zygote, signal.SIGCONT)
    it.until(lambda: all(it.there()))

    assert [False] * (BY_EXEC + 3) + [True] == [it.is_forked(each) for each in it.asked]
    assert 1 == lines.getvalue().count("the zygote does not answer")


def test_a_zygote_that_is_never_ready_is_in_nobodys_way(line: Callable[..., Line]) -> None:
    """A process waits for a zygote to become ready for STARTING_S at most, which is longer than any start takes."""
    it = line(NEVER_READY)
    it.births.prepare()
    it.start()
    assert [False] == it.there()
    it.pass_time(STARTING_S)

    assert [True] == it.there()


def test_whom_a_zygote_has_not_borne_when_it_dies_the_next_one_bears(line: Callable[..., Line]) -> None:
    """If a zygote dies, the next one forks all that are still queued. A zygote that lived long is replaced at once,
    since it cannot have been the program that ended it.
    """
    it = line()
    it.prepare()
    it.pass_time(REST_S)
    first = it.zygote
    os.kill(first, signal.SIGSTOP)
    it.start("wo")
    it.start()
    os.kill(first, signal.SIGKILL)
    it.until(lambda: all(it.there()))

    assert it.zygote not in (0, first)
    assert all(it.is_forked(each) for each in it.asked)


def test_where_a_zygote_cannot_live_they_come_by_exec(line: Callable[..., Line]) -> None:
    """If zygotes end at once, processes are started by exec, a few at a time; another zygote is tried after a while."""
    it = line((sys.executable, "-I", "-S", "-c", ""))
    it.births.prepare()
    for _ in range(BY_EXEC + 1):
        it.start()
    it.until(lambda: not it.zygote)
    assert [True] * BY_EXEC + [False] == it.there()
    it.births.has_begun(it.asked[1])
    assert all(it.there())
    it.births._command = NEVER_READY  # one that lives long enough to be seen
    it.pass_time(REST_S)

    assert it.zygote


def test_who_is_not_wanted_any_more_has_no_turn(line: Callable[..., Line]) -> None:
    """A queued process that is no longer wanted is not started; the other one of the same request is started alone."""
    it = line()
    it.births.prepare()
    worker, opener = it.start("wo")
    gone, both = it.start("wo")
    for each in (worker, gone, both):
        each.kill()
    [last] = it.start(OPENER)
    it.until(lambda: last.is_there)

    assert [False, True, False, False, True] == it.there()
    assert it.is_forked(opener)


def test_what_cannot_be_started_is_said_to_who_asks(line: Callable[..., Line]) -> None:
    """If a process cannot be started, the caller gets the error; if it was queued, its end gives the reason. Nothing is
    left of the other processes of the request.
    """
    it = line(())
    with pytest.raises(KernelError, match="No such file"):
        it.start("wo", ("/nonexistent/worker",))
    assert [False, False] == it.there()
    late = line(NEVER_READY)
    late.births.prepare()
    ends: list[int] = []
    for _ in range(2):
        late.start("w", ("/nonexistent/worker",))[0].watch(late.loop, lambda: ends.append(1))
    late.pass_time(STARTING_S)

    assert [1, 1] == ends
    assert {"start a worker process: No such file or directory"} == {each.describe_end() for each in late.asked}


def test_another_program_s_zygote_is_waited_for(line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the program has changed, all queued processes are forked by a zygote of the new program."""
    it = line()
    it.prepare()
    first = it.zygote
    os.kill(first, signal.SIGSTOP)
    it.start()
    monkeypatch.setattr(it.births, "_program", (0, 0))
    it.births.renew()
    it.start()
    it.until(lambda: all(it.there()))

    assert first != it.zygote
    assert all(it.is_forked(each) for each in it.asked)


def test_the_service_s_end_is_the_line_s(line: Callable[..., Line]) -> None:
    """When the service ends, queued processes are not started any more."""
    it = line(NEVER_READY)
    it.births.prepare()
    [worker] = it.start()
    worker.socket.send(codec.encode(messages.Report(3)))
    it.births.close()
    it.pass_time(STARTING_S)

    assert not worker.is_there
    assert "the service ends" == worker.describe_end()
