"""Worker processes: what the supervisor hears of them, and that nothing of them is left."""

from __future__ import annotations

import os
import selectors
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.helpers import FAKE_WORKER
from xenbackend import control
from xenbackend.errors import KernelError
from xenbackend.supervisor.fleet import Fleet, Worker
from xenbackend.supervisor.memories import Memories

OPEN = control.Open(vbd="vbd/5/51712", host="", frontend_domid=5, chain="null:1G", read_only=False)

pytestmark = pytest.mark.slow  # every one starts a process


class Heard:
    """A worker and all that it said."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.selector = selectors.DefaultSelector()
        self.messages: list[control.Message] = []
        self.ends: list[str] = []
        self.memories = Memories()
        self.worker: Worker = Fleet(self.selector, command).start(self.messages.append, self.ends.append, self.memories)

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


def _open_descriptors() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def descriptors() -> Iterator[None]:
    """No descriptor is left open by the test."""
    before = _open_descriptors()
    yield
    assert before == _open_descriptors()


def _python(tmp_path: Path, text: str) -> tuple[str, ...]:
    script = tmp_path / "worker.py"
    script.write_text("import os, socket, sys\nchannel = socket.socket(fileno=int(sys.argv[2]))\n" + text)
    return (sys.executable, "-S", str(script))


@pytest.mark.usefixtures("descriptors")
def test_a_life_in_order() -> None:
    """A worker that is opened and closed says so, it gets the descriptors of a message, and nothing is left of it."""
    heard = Heard(FAKE_WORKER)
    page = os.memfd_create("journal")
    heard.worker.send(OPEN, [page])
    while not heard.messages:
        for key, _ in heard.selector.select(20):
            key.data()
    reads = int.from_bytes(os.pread(page, 8, 0), "little")
    os.close(page)
    heard.worker.send(control.Close())
    sentence = heard.until_end()
    heard.selector.close()

    assert [control.Opened, control.Closed] == [type(each) for each in heard.messages]
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
    text = f"channel.send({control.encode(control.Log('info', 'bye', {}))!r}); os._exit(1)"
    heard = Heard(_python(tmp_path, text))
    os.waitid(os.P_PID, heard.worker.pid, os.WEXITED | os.WNOWAIT)  # message and end are both there to be seen
    heard.until_end()
    heard.selector.close()

    assert [control.Log("info", "bye", {})] == heard.messages


@pytest.mark.usefixtures("descriptors")
def test_a_worker_that_does_not_read_is_killed(tmp_path: Path) -> None:
    """Messages to a worker never make the supervisor wait: when its socket is full it is killed."""
    heard = Heard(_python(tmp_path, "import signal; signal.pause()"))
    for number in range(10_000):
        heard.worker.send(control.Command(number, "log", "get", ["x" * 1000]))
        if heard.selector.select(0):
            break

    assert "the worker was killed: it does not read its messages" == heard.until_end()
    heard.selector.close()


@pytest.mark.usefixtures("descriptors")
def test_memories_are_kept_and_let_go(tmp_path: Path) -> None:
    """A memory that a worker had kept outlives it; what comes beside it, or in its place, is closed at once."""
    keep = control.encode(control.Keep("log:bitmap", 4096))
    text = f"fd = os.memfd_create('x')\nfor _ in range(3): socket.send_fds(channel, [{keep!r}], [fd, fd])"
    heard = Heard(_python(tmp_path, text))
    heard.until_end()
    heard.selector.close()

    assert ["log:bitmap"] == list(heard.memories.open_for(""))
    heard.memories.close()
    assert 3 == len(heard.messages)


@pytest.mark.usefixtures("descriptors")
def test_a_program_that_is_missing_is_an_error_of_the_host() -> None:
    """A worker that cannot be started leaves nothing open."""
    selector = selectors.DefaultSelector()
    with pytest.raises(KernelError, match="start a worker process"):
        Fleet(selector, ("/nonexistent/worker",)).start(lambda _: None, lambda _: None, Memories())
    selector.close()
