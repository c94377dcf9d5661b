"""The zygote as the service holds it: workers that it forks are our children, and neither they nor the service wait for
it or depend on it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.privileges import MAY_COME_FIRST
from tests.supervisor.helpers import run_until
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, messages
from xenbackend.supervisor.service.process import Process
from xenbackend.supervisor.service.zygote import COMMAND, Zygote

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]

REAL = (*COMMAND, "--host", "xenbackend.rig.host")
_NAMES = "pid = os.fork() or os._exit(0); socket.send_fds(channel, [b'pidfd'], [os.pidfd_open(pid)])"


def _fake(text: str) -> tuple[str, ...]:
    head = "import os, socket, sys; channel = socket.socket(fileno=int(sys.argv[2]))\n"
    return (sys.executable, "-S", "-c", head + text)


class Asked:
    """A zygote, the loop around it, and the processes that it is asked for."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.loop = Reactor()
        self.changes = 0
        self.it = Zygote(self.loop, command, self._note)

    def _note(self) -> None:
        self.changes += 1

    def until(self, condition: Callable[[], object]) -> None:
        """Let the loop run until the condition holds."""
        run_until(self.loop, condition)

    def ask(self, kinds: str = "w") -> list[Process]:
        """Ask for processes, once it is ready."""
        self.until(lambda: self.it.is_ready)
        processes = [Process.to_come() for _ in kinds]
        self.it.ask(kinds, (), processes)
        return processes

    def fork(self, kinds: str = "w") -> list[Process]:
        """Ask for processes, and return them once they exist."""
        processes = self.ask(kinds)
        self.until(lambda: all(each.is_there for each in processes))
        return processes

    def close(self) -> None:
        self.it.close()
        assert not self.it._late
        self.loop.close()


@pytest.fixture
def ask(descriptors: None) -> Iterator[Callable[..., Asked]]:
    """Return a function that starts a zygote."""
    made: list[Asked] = []

    def start(command: tuple[str, ...] = REAL) -> Asked:
        made.append(Asked(command))
        return made[-1]

    yield start
    for each in made:
        each.close()


def _children() -> set[int]:
    """Return this process's children that have not been waited for."""
    return {int(each) for each in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}


def _end(processes: list[Process]) -> list[str]:
    """Kill processes, and return how they ended."""
    for each in processes:
        each.kill()
    return [each.describe_end() for each in processes]


def test_a_worker_is_as_one_that_we_started(ask: Callable[..., Asked]) -> None:
    """A forked worker is our child, serves its socket, and its end is described, even if the zygote has ended before
    it.
    """
    asked = ask()
    [first], [second] = asked.fork(), asked.fork()
    asked.it.close()
    second.socket.setblocking(True)
    second.socket.send(codec.encode(messages.Report(3)))
    standing = codec.from_worker(second.socket.recv(messages.MAX_MESSAGE))
    first.kill()
    second.socket.send(codec.encode(messages.Close(4)))

    assert isinstance(standing, messages.Standing)
    assert 3 == standing.number
    assert first.pid != second.pid
    assert "the worker was ended by SIGKILL" == first.describe_end()
    assert "the worker ended unexpectedly with exit status 0" == second.describe_end()


def test_only_workers_come_to_us(ask: Callable[..., Asked]) -> None:
    """A helper that a driver has started does not become our child when its worker ends: nothing here would wait for
    it.
    """
    asked = ask()
    for each in asked.fork():
        each.leave()
    with subprocess.Popen(["sh", "-c", "true & echo $!"], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        orphan = int(shell.stdout.readline())

    with pytest.raises(ChildProcessError):
        os.waitpid(orphan, os.WNOHANG)


def test_a_worker_is_whole_when_it_is_there(ask: Callable[..., Asked]) -> None:
    """By the time we know of a worker, the process between the zygote and it has ended, so that its own end is ours to
    collect, however early it comes. It leads its session, so that its priority can be raised.
    """
    asked = ask()
    ends = set()
    for _ in range(20):
        [worker] = asked.fork()
        assert worker.pid == os.getsid(worker.pid)
        ends |= set(_end([worker]))

    assert {"the worker was ended by SIGKILL"} == ends


def test_a_worker_and_its_opener_come_together(ask: Callable[..., Asked]) -> None:
    """A worker and its opener that are asked for together are each our child, lead their sessions and have only their
    own socket: each ends when that is closed.
    """
    asked = ask()
    worker, opener = asked.fork("wo")
    assert [worker.pid, opener.pid] == [os.getsid(worker.pid), os.getsid(opener.pid)]
    opener.socket.shutdown(socket.SHUT_WR)

    assert 0 == opener.wait()
    assert not select.select([worker.pidfd], [], [], 0)[0]
    worker.socket.shutdown(socket.SHUT_WR)
    assert "the worker ended unexpectedly with exit status 0" == worker.describe_end()


def test_it_comes_before_others(ask: Callable[..., Asked]) -> None:
    """The zygote has a higher priority than the service, since a disk waits for whatever it does; the workers that it
    forks have the service's.
    """
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    asked = ask()
    first = os.getpriority(os.PRIO_PROCESS, asked.it.pid)
    [worker] = asked.fork()
    seen = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (asked.it.pid, worker.pid)]
    _end([worker])

    assert first < ours or not MAY_COME_FIRST
    assert [first, ours] == seen


def test_what_was_said_before_a_worker_is_there_is_what_it_hears_first(ask: Callable[..., Asked]) -> None:
    """Messages may be sent before a worker exists, and are the first that it receives. `when_there` is called before
    the worker can have read any.
    """
    asked = ask()
    asked.until(lambda: asked.it.is_ready)
    os.kill(asked.it.pid, signal.SIGSTOP)
    [worker] = asked.ask()
    worker.socket.send(codec.encode(messages.Report(3)))
    told: list[bool] = []
    worker.when_there(lambda: told.append(worker.is_there and worker.far is None))
    asked.loop.call_later(0.05, asked.loop.stop)
    asked.loop.run()
    assert ([], 0, False) == (told, worker.pid, worker.is_there)
    os.kill(asked.it.pid, signal.SIGCONT)
    asked.until(lambda: worker.is_there)
    worker.socket.setblocking(True)
    standing = codec.from_worker(worker.socket.recv(messages.MAX_MESSAGE))
    _end([worker])

    assert isinstance(standing, messages.Standing)
    assert ([True], 3) == (told, standing.number)


@pytest.mark.parametrize("how", ["given up", "forgotten"])
def test_who_comes_too_late_has_heard_nothing_and_ends(ask: Callable[..., Asked], how: str) -> None:
    """A process that is forked after it was given up, or forgotten, ends without having read a message; the zygote
    serves further requests.
    """
    before = _children()
    asked = ask()
    asked.until(lambda: asked.it.is_ready)
    os.kill(asked.it.pid, signal.SIGSTOP)
    late = asked.ask("wo")
    late[0].socket.send(codec.encode(messages.Report(3)))
    if how == "given up":
        late[0].kill()
        late[1].kill()
    else:
        asked.it.forget()
    os.kill(asked.it.pid, signal.SIGCONT)
    asked.until(lambda: asked.it.is_ready)
    asked.until(lambda: not asked.it._late)
    following = asked.fork()

    assert {asked.it.pid, following[0].pid} == _children() - before
    assert [False, False] == [each.is_there for each in late]
    if how == "given up":
        with pytest.raises(ConnectionResetError):  # what was sent was not read
            late[0].socket.recv(16)
    else:
        assert late[0].far is not None
        assert messages.Report(3) == codec.from_supervisor(late[0].far.recv(100))
    assert ["the worker was ended by SIGKILL"] == _end(following)
    assert {"the worker was no longer needed"} == set(_end(late))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("channel.send(b'failed')", "it could not fork"),
        ("channel.send(b'born')", "it sent no pidfd"),
        ("", "it ended"),
        (_NAMES, "it ended in the middle of it"),
        (f"{_NAMES}; channel.send(b'failed')", "it failed in the end"),
        ("channel.send(b'ready'); channel.recv(1)", "it says what it was not asked"),
    ],
)
def test_one_that_fails_is_good_for_nothing(ask: Callable[..., Asked], text: str, why: str) -> None:
    """A zygote that fails in any way is ended. None of the processes asked for exists, and nothing stays open."""
    asked = ask(_fake(f"channel.send(b'ready'); channel.recv(16)\n{text}\n# {why}"))
    processes = asked.ask()
    changes = asked.changes
    asked.until(lambda: asked.it.is_over)

    assert (False, changes + 1) == (asked.it.is_ready, asked.changes)
    assert processes == asked.it.asked, "for whoever has others come in their place"
    os.waitid(os.P_PID, asked.it.pid, os.WEXITED | os.WNOWAIT)
    assert not processes[0].is_there
    _end(processes)


def test_one_that_never_answers_leaves_nothing(ask: Callable[..., Asked]) -> None:
    """When a zygote that does not answer is closed, nothing of it, nor of a process that it has named, stays open."""
    asked = ask(_fake(f"channel.send(b'ready'); channel.recv(16); {_NAMES}; channel.recv(1)"))
    processes = asked.ask()
    asked.until(lambda: asked.it._born)
    asked.it.close()

    assert not processes[0].is_there
    _end(processes)


def test_one_that_was_killed_says_so(ask: Callable[..., Asked]) -> None:
    """A zygote that was killed is over, and no longer ready."""
    asked = ask()
    _end(asked.fork())
    os.kill(asked.it.pid, signal.SIGKILL)
    asked.until(lambda: asked.it.is_over)

    assert not asked.it.is_ready
