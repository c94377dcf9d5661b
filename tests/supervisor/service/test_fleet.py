"""Worker processes: what the supervisor hears of them, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.supervisor.helpers import FAKE_WORKER
from xenbackend import journal
from xenbackend.protocol import messages
from xenbackend.supervisor.service import zygote
from xenbackend.supervisor.service.fleet import Fleet, Worker

OPEN = messages.Open(vbd="vbd/5/51712", host="", frontend_domid=5, chain="null:1G", read_only=False)

pytestmark = pytest.mark.slow  # every one starts a process


class Heard:
    """A worker and all that it said."""

    def __init__(self, command: tuple[str, ...], zygote: tuple[str, ...] = ()) -> None:
        self.selector = selectors.DefaultSelector()
        self.messages: list[messages.Message] = []
        self.ends: list[str] = []
        self.fds: list[int] = []
        self.fleet = Fleet(self.selector, command, zygote)
        self.worker = self.start()

    def start(self) -> Worker:
        """Start another worker, and return it."""
        self.worker = self.fleet.start(self._hear, self.ends.append)
        return self.worker

    def kill(self) -> None:
        """Kill the worker, and wait for its end."""
        self.ends.clear()
        self.worker.kill("the test wants it")
        self.until_end()

    def _hear(self, message: messages.Message, fds: list[int]) -> None:
        self.messages.append(message)
        self.fds += fds

    def until(self, condition: Callable[[], object]) -> None:
        """Listen until the condition holds."""
        while not condition():
            ready = self.selector.select(20)
            assert ready, "it never happened"
            for key, _ in ready:
                if self.selector.get_map().get(key.fd) is key:
                    key.data()

    def until_end(self) -> str:
        """Listen until the process has ended, and return the sentence about it."""
        while not self.ends:
            ready = self.selector.select(20)
            assert ready, "it never ended"
            # The process's end first, as may happen: what it said before must not be lost.
            for key, _ in sorted(ready, key=lambda each: each[0].fd, reverse=True):
                if self.selector.get_map().get(key.fd) is key:
                    key.data()
        return self.ends[0]


def _python(tmp_path: Path, text: str) -> tuple[str, ...]:
    script = tmp_path / "worker.py"
    script.write_text("import os, socket, sys\nchannel = socket.socket(fileno=int(sys.argv[2]))\n" + text)
    return (sys.executable, "-S", str(script))


@pytest.mark.usefixtures("descriptors")
def test_a_life_in_order() -> None:
    """A worker that is opened and closed says so, it gets the descriptors of a message, and nothing is left of it."""
    heard = Heard(FAKE_WORKER)
    page = os.memfd_create("journal")
    os.ftruncate(page, journal.SIZE)
    heard.worker.send(OPEN, [page])
    heard.until(lambda: len(heard.messages) == 2)
    reads = int.from_bytes(os.pread(page, 8, 0), "little")
    os.close(page)
    heard.worker.send(messages.Close())
    sentence = heard.until_end()
    heard.selector.close()

    assert [messages.Log, messages.Opened, messages.Closed] == [type(each) for each in heard.messages]
    assert 7 == reads
    assert "the worker ended unexpectedly with exit status 0" == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("os.kill(os.getpid(), 9)", "the worker was ended by SIGKILL"),
        ("sys.exit(4)", "the worker ended unexpectedly with exit status 4"),
        ("channel.send(b'nonsense'); channel.recv(1)", "the worker was killed: it sent something that is no message"),
        ("channel.send(b'[]'); channel.recv(1)", "the worker was killed: it sent something that is no message"),
    ],
)
@pytest.mark.usefixtures("descriptors")
def test_every_end_has_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    """However a worker ends, the supervisor hears once, with the reason."""
    heard = Heard(_python(tmp_path, text))

    assert sentence == heard.until_end()
    assert 1 == len(heard.ends)
    heard.selector.close()


@pytest.mark.usefixtures("descriptors")
def test_last_words_are_heard(tmp_path: Path) -> None:
    """What a worker said before it died is taken before its end is told."""
    text = f"channel.send({messages.encode(messages.Log('info', 'bye', {}))!r}); os._exit(1)"
    heard = Heard(_python(tmp_path, text))
    os.waitid(os.P_PID, heard.worker.pid, os.WEXITED | os.WNOWAIT)  # message and end are both there to be seen
    heard.until_end()
    heard.selector.close()

    assert [messages.Log("info", "bye", {})] == heard.messages


@pytest.mark.usefixtures("descriptors")
def test_a_worker_that_does_not_read_is_killed(tmp_path: Path) -> None:
    """Messages to a worker never make the supervisor wait: when its socket is full it is killed."""
    heard = Heard(_python(tmp_path, "import signal; signal.pause()"))
    for number in range(10_000):
        heard.worker.send(messages.Command(number, "log", "get", ["x" * 1000]))
        if heard.selector.select(0):
            break

    assert "the worker was killed: it does not read its messages" == heard.until_end()
    heard.selector.close()


@pytest.mark.usefixtures("descriptors")
def test_a_memory_comes_with_its_message(tmp_path: Path) -> None:
    """A descriptor is handed on beside its message; one too many, and one beside what is no message, is closed."""
    keep = messages.encode(messages.Keep("log:bitmap", 4096))
    text = (
        f"fd = os.memfd_create('x')\nfor _ in range(3): socket.send_fds(channel, [{keep!r}], [fd, fd])\n"
        "socket.send_fds(channel, [b'nonsense'], [fd])\nchannel.recv(1)"
    )
    heard = Heard(_python(tmp_path, text))
    heard.until_end()
    heard.selector.close()
    for fd in heard.fds:
        os.close(fd)

    assert (3, 3) == (len(heard.messages), len(heard.fds))


@pytest.mark.usefixtures("descriptors")
def test_what_a_worker_of_another_program_says_is_a_line_in_the_log(tmp_path: Path) -> None:
    """A kind that we do not know costs a guest nothing; another version of the protocol does, and is told."""
    odd = json.dumps({"version": messages.VERSION, "kind": "Sung", "song": "la"}).encode()
    other = json.dumps({"version": messages.VERSION + 1, "kind": "Closed"}).encode()
    heard = Heard(_python(tmp_path, f"channel.send({odd!r}); channel.send({other!r}); channel.recv(1)"))
    sentence = heard.until_end()
    heard.selector.close()

    [line] = heard.messages
    assert isinstance(line, messages.Log)
    assert ("warning", True) == (line.level, "Sung" in line.event)
    assert "the worker was killed: it sent something that is no message" == sentence


@pytest.mark.usefixtures("descriptors")
def test_a_worker_that_is_left_goes_on_for_whoever_adopts_it() -> None:
    """Who has its two descriptors can talk to a worker that somebody else started, and hears how it ends."""
    heard = Heard(FAKE_WORKER)
    near, pidfd = (os.dup(fd) for fd in heard.worker.descriptors)
    pid = heard.worker.pid
    heard.worker.leave()
    nothing_left = not heard.selector.get_map()
    heard.worker = Fleet(heard.selector, FAKE_WORKER).adopt((near, pidfd), heard._hear, heard.ends.append)
    heard.worker.send(messages.Report(5))
    heard.until(lambda: heard.messages)
    adopted = heard.worker.pid
    heard.worker.kill("the test wants it")
    sentence = heard.until_end()
    heard.selector.close()

    assert nothing_left
    assert pid == adopted
    assert [5] == [each.report for each in heard.messages if isinstance(each, messages.Standing)]
    assert "the test wants it" == sentence


@pytest.mark.usefixtures("descriptors")
def test_workers_come_from_a_zygote_where_there_is_one() -> None:
    """They come by exec while it is not ready. One that died is replaced after a while, so that one that cannot live
    keeps no host busy; in the end it is sent away, and its workers go on.
    """
    before = set(_children())

    def children() -> list[int]:
        return [each for each in _children() if each not in before]

    heard = Heard(FAKE_WORKER, (*zygote.COMMAND, "--host", "xenbackend.rig.host"))
    heard.kill()
    assert [] == children()
    heard.fleet.prepare(0.0)
    [first] = children()
    heard.fleet.prepare(0.0)
    assert [first] == children()
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    for now in (1.0, 5.9):
        heard.fleet.prepare(now)
        assert [] == children()
    heard.fleet.prepare(6.1)
    [second] = children()
    while heard.start() and zygote.COMMAND[-1] not in Path(f"/proc/{heard.worker.pid}/cmdline").read_text():
        heard.kill()
    heard.fleet.close()

    assert [heard.worker.pid] == children()
    assert first != second
    heard.worker.send(messages.Report(5))
    heard.until(lambda: heard.messages)
    heard.kill()
    heard.selector.close()


def _children() -> list[int]:
    """Return this process's children that have not been waited for."""
    task = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return [int(each) for each in task.read_text().split()]
