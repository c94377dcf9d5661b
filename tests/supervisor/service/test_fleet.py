"""Worker processes: what the supervisor hears from them, and that nothing of them is left."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import os
import resource
import signal
import sys
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor.helpers import FAKE_OPENER, FAKE_WORKER, PATIENCE_S, settle
from tests.until import until
from xenbackend import journal
from xenbackend.errors import KernelError
from xenbackend.kernel.process import is_ending
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import codec, messages
from xenbackend.supervisor.service import births, zygote
from xenbackend.supervisor.service.births import REST_S
from xenbackend.supervisor.service.fleet import HANG_UP_S, Fleet, Worker

OPEN = messages.Open(number=7, vbd="vbd/5/51712", host="", frontend_domid=5, chain="null:1G", read_only=False)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]  # every one starts a process


class Heard:
    """A worker and all that it has said."""

    def __init__(self, command: tuple[str, ...], zygote: tuple[str, ...] = ()) -> None:
        self.ahead_s = 0.0  # how far the loop's clock is ahead
        self.bugs: list[Exception] = []
        self.loop = Reactor(lambda: time.monotonic() + self.ahead_s, on_bug=self.bugs.append)
        self.messages: list[messages.FromWorker] = []
        self.ends: list[str] = []
        self.on_message: Callable[[messages.FromWorker], None] = self.hear
        self.fleet = Fleet(self.loop, command, zygote, FAKE_OPENER)
        self.worker = self.start()

    def start(self) -> Worker:
        """Start another worker, and return it."""
        self.worker = self.fleet.start(self._said, self.ends.append)
        return self.worker

    def kill(self) -> None:
        """Kill the worker, and wait for its end."""
        self.ends.clear()
        self.worker.kill("the test wants it")
        self.until_end()

    def _said(self, message: messages.FromWorker) -> None:
        self.on_message(message)

    def hear(self, message: messages.FromWorker) -> None:
        """Note what is said."""
        self.messages.append(message)

    def until(self, condition: Callable[[], object]) -> None:
        """Listen until the condition holds."""

        def look() -> bool:
            if condition() or late:
                self.loop.stop()
            return False

        late: list[int] = []
        patience = self.loop.timer(lambda: late.append(1))
        patience.set(self.loop.now() + PATIENCE_S)
        self.loop.before_sleep(look)
        self.loop.run()
        self.loop.remove_hook(look)
        patience.set(None)
        assert condition(), "it never happened"

    def until_end(self) -> str:
        """Listen until the process has ended, and return the sentence about it."""
        self.until(lambda: self.ends)
        return self.ends[0]

    def close(self) -> None:
        """Close everything."""
        self.fleet.close()
        self.loop.close()


@pytest.fixture
def hear(descriptors: None) -> Iterator[Callable[..., Heard]]:
    """Keep a message with its descriptors."""
    made: list[Heard] = []

    def start(*arguments: Any) -> Heard:
        made.append(Heard(*arguments))
        return made[-1]

    yield start
    for each in made:
        each.close()


def _python(tmp_path: Path, text: str) -> tuple[str, ...]:
    script = tmp_path / "worker.py"
    script.write_text("import os, socket, sys\nchannel = socket.socket(fileno=int(sys.argv[2]))\n" + text)
    return (sys.executable, "-S", str(script))


def test_a_life_in_order(hear: Callable[..., Heard]) -> None:
    """A worker reports that it has opened its chain, receives the descriptors of a message, and ends when it is told to
    close; nothing of it is left.
    """
    heard = hear(FAKE_WORKER)
    page = os.memfd_create("journal")
    os.ftruncate(page, journal.SIZE)
    heard.worker.send(OPEN, [page])
    heard.until(lambda: any(isinstance(each, messages.Standing) for each in heard.messages))
    reads = int.from_bytes(os.pread(page, 8, 0), "little")
    os.close(page)
    heard.worker.send(messages.Close(8))
    sentence = heard.until_end()
    [standing] = [each for each in heard.messages if isinstance(each, messages.Standing)][:1]

    assert (7, messages.Stage.OPEN, 7) == (standing.number, standing.stage, reads)
    assert "the worker ended unexpectedly with exit status 0" == sentence


BREACH = "the worker was killed: it broke the protocol: "
LOG = codec.encode(messages.Log("info", "bye"))
NOT_ALONE = "a datagram that is too long, or has descriptors beside it"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("os.kill(os.getpid(), 9)", "the worker was ended by SIGKILL"),
        ("sys.exit(4)", "the worker ended unexpectedly with exit status 4"),
        ("channel.send(b'nonsense'); channel.recv(1)", f"{BREACH}not a message: b'nonsense'"),
        ("channel.send(b'[]'); channel.recv(1)", f"{BREACH}not a message of version {messages.VERSION}: b'[]'"),
        ("channel.send(b''); channel.recv(1)", f"{BREACH}an empty datagram"),
        (f"socket.send_fds(channel, [{LOG!r}], [0]); channel.recv(1)", f"{BREACH}{NOT_ALONE}"),
        (f"socket.send_fds(channel, [{LOG!r}], [0] * 253); channel.recv(1)", f"{BREACH}{NOT_ALONE}"),
        ("socket.send_fds(channel, [b''], [0]); channel.recv(1)", f"{BREACH}{NOT_ALONE}"),
        ("channel.setsockopt(1, 7, 1 << 20); channel.send(b'x' * 300_000); channel.recv(1)", f"{BREACH}{NOT_ALONE}"),
    ],
)
def test_every_end_has_a_sentence(hear: Callable[..., Heard], tmp_path: Path, text: str, sentence: str) -> None:
    """However a worker ends, the supervisor is told once, with the reason. A message that breaks the protocol ends the
    worker; it is not handed on, and the service never has a descriptor that came beside it.
    """
    heard = hear(_python(tmp_path, text))

    assert heard.until_end().startswith(sentence)
    assert (1, []) == (len(heard.ends), heard.messages)
    assert heard.fleet.breaches == sentence.startswith(BREACH)


def test_nothing_is_heard_after_a_breach(hear: Callable[..., Heard], tmp_path: Path, lines: io.StringIO) -> None:
    """A worker that has broken the protocol is counted as one breach, whatever else it sends. The fleet logs nothing
    about it; that is left to its vbd.
    """
    text = f"for _ in range(100): channel.send({LOG!r})\nchannel.send(b'x')\n"
    heard = hear(_python(tmp_path, text + f"while True: channel.send({LOG!r}); channel.send(b'x')"))
    heard.until_end()

    assert (100, 1) == (len(heard.messages), heard.fleet.breaches)
    assert heard.worker.has_broken_protocol
    assert "" == lines.getvalue()


@pytest.mark.parametrize("how", ["close()", "shutdown(socket.SHUT_RDWR)"])
def test_a_worker_that_hangs_up_and_stays_is_killed(hear: Callable[..., Heard], tmp_path: Path, how: str) -> None:
    """A worker that closes its socket gets the time that a worker needs to end, and is killed after that: it could
    serve for ever, and nobody could tell it anything.
    """
    heard = hear(_python(tmp_path, f"channel.recv(9999)\nchannel.{how}\nimport time; time.sleep(1000)"))
    heard.worker.send(messages.Report(5))  # it was told something, but not to close
    heard.until(lambda: not heard.worker._is_heard)
    assert [] == heard.ends
    heard.ahead_s = HANG_UP_S

    assert "the worker was killed: it closed its socket, and did not end" == heard.until_end()
    assert 1 == heard.fleet.breaches


_FIRST_THREAD_ENDS = """
import ctypes, threading
threading.Thread(target=threading.Event().wait).start()
channel.close()
ctypes.CDLL(None).syscall(60, 0)
"""  # exit(2) of this thread alone


@pytest.mark.parametrize("why", ["its first thread has ended", "no descriptor is left", "its number is not known"])
def test_a_worker_that_hangs_up_is_killed_whatever_is_known_of_it(
    hear: Callable[..., Heard], tmp_path: Path, why: str
) -> None:
    """A worker that closed its socket and stays is killed even if it seems to be ending, or if nobody can tell; then it
    has not broken the protocol.
    """
    first_ends = why == "its first thread has ended"
    heard = hear(
        _python(tmp_path, _FIRST_THREAD_ENDS if first_ends else "channel.close()\nimport time; time.sleep(1000)")
    )
    heard.until(lambda: not heard.worker._is_heard)
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    if first_ends:
        until(lambda: is_ending(heard.worker.pid))  # not by the loop: it would sleep until the worker is killed
        assert [] == heard.ends
    elif why == "its number is not known":
        heard.worker._process.pid = 0
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, former[1]))
    try:
        heard.ahead_s = HANG_UP_S
        sentence = heard.until_end()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)

    assert ("the worker was ended by SIGKILL", 0) == (sentence, heard.fleet.breaches)


def test_a_close_that_takes_long_breaks_no_protocol(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """A worker that was told to close, and has closed its socket, but still waits for storage, is not killed for that,
    and has broken no protocol.
    """
    os.mkfifo(tmp_path / "storage")
    text = f"channel.recv(9999)\nchannel.close()\nopen({str(tmp_path / 'storage')!r}).read()\n"
    heard = hear(_python(tmp_path, text))
    heard.worker.send(messages.Close(1))
    heard.until(lambda: not heard.worker._is_heard)
    heard.ahead_s = HANG_UP_S
    settle(heard.loop)
    assert ([], 0) == (heard.ends, heard.fleet.breaches)
    (tmp_path / "storage").write_text("")

    assert "the worker ended unexpectedly with exit status 0" == heard.until_end()
    assert not heard.worker.has_broken_protocol


def test_a_bug_over_a_message_concerns_no_other(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """If the handling of a message raises an exception, that is reported, and later messages are still handled."""
    heard = hear(_python(tmp_path, f"for _ in range(3): channel.send({LOG!r})\nchannel.recv(1)"))

    def fail(message: messages.FromWorker) -> None:
        heard.messages.append(message)
        if len(heard.messages) == 2:
            raise ValueError("a bug of ours")

    heard.on_message = fail
    heard.until(lambda: len(heard.messages) == 3)
    heard.kill()

    assert (["a bug of ours"], 0) == ([str(each) for each in heard.bugs], heard.fleet.breaches)


def test_a_worker_has_the_loop_for_a_moment_only(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """However many messages a worker has sent, and however long each takes, the loop handles them for 20 ms in a pass,
    and the rest in later ones.
    """
    heard = hear(_python(tmp_path, f"for _ in range(40): channel.send({LOG!r})\nchannel.recv(1)"))
    heard.until(lambda: heard.worker.is_there)
    heard.worker._deafen()
    until(lambda: _waiting(heard.worker) == 40 * len(LOG))
    heard.worker._is_heard = True
    heard.loop.add(heard.worker._process.socket.fileno(), heard.worker._receive)
    passes: list[int] = []

    def take(message: messages.FromWorker) -> None:
        heard.hear(message)
        heard.ahead_s += 0.006

    def note() -> bool:
        passes.append(len(heard.messages))
        return False

    heard.on_message = take
    heard.loop.before_sleep(note)
    heard.until(lambda: len(heard.messages) == 40)
    heard.kill()

    assert max(after - before for before, after in itertools.pairwise(passes)) <= 4


def _waiting(worker: Worker) -> int:
    """Return how many bytes of messages wait in the supervisor's end of the socket."""
    count = array("i", [0])
    fcntl.ioctl(worker.descriptors[0], termios.FIONREAD, count)
    return count[0]


def test_last_words_are_heard(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """All messages that a worker sent before it died are handled before its end is reported, even if it takes long."""
    heard = hear(_python(tmp_path, f"for _ in range(200): channel.send({LOG!r})\nos._exit(1)"))

    def take(message: messages.FromWorker) -> None:
        heard.hear(message)
        heard.ahead_s += 0.006

    heard.on_message = take
    os.waitid(os.P_PID, heard.worker.pid, os.WEXITED | os.WNOWAIT)  # all messages and the end have come
    heard.worker._reap()

    assert [messages.Log("info", "bye")] * 200 == heard.messages
    assert 1 == len(heard.ends)


def test_a_bug_over_last_words_does_not_hide_the_end(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """The end of a worker is reported even if the handling of its last messages raises exceptions."""
    heard = hear(_python(tmp_path, f"channel.send({LOG!r})\nchannel.send({LOG!r})"))

    def fail(message: messages.FromWorker) -> None:
        raise ValueError("a bug of ours")

    heard.on_message = fail
    os.waitid(os.P_PID, heard.worker.pid, os.WEXITED | os.WNOWAIT)
    heard.worker._reap()

    assert (2, 1) == (len(heard.bugs), len(heard.ends))


def test_a_worker_that_does_not_read_is_killed(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """The supervisor never waits for a worker to read: a worker whose socket is full is killed."""
    heard = hear(_python(tmp_path, "import signal; signal.pause()"))
    for number in range(1000):
        heard.worker.send(messages.Ask(number, messages.Command("log", "get", ["x" * 1000])))

    assert "the worker was killed: it did not read its messages" == heard.until_end()


def test_a_message_that_cannot_be_sent_is_told(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """A message that the host does not take, because it is longer than a socket's buffer, raises an error. A message to
    a worker that has ended does not: its end is reported.
    """
    heard = hear(_python(tmp_path, "channel.recv(1)"))
    longest = messages.Ask(1, messages.Command("log", "get", ["x" * (1 << 23)]))
    with pytest.raises(KernelError, match="send Ask to a worker: Message too long"):
        heard.worker.send(longest)
    heard.worker.send(messages.Ask(2, messages.Pause()))
    os.waitid(os.P_PID, heard.worker.pid, os.WEXITED | os.WNOWAIT)
    heard.worker.send(messages.Ask(3, messages.Pause()))

    assert "the worker ended unexpectedly with exit status 0" == heard.until_end()


def test_a_worker_that_is_left_goes_on_for_whoever_adopts_it(hear: Callable[..., Heard]) -> None:
    """Whoever adopts a worker by its two descriptors can talk to it, and is told how it ends."""
    heard = hear(FAKE_WORKER)
    near, pidfd = (os.dup(fd) for fd in heard.worker.descriptors)
    pid = heard.worker.pid
    before = len(heard.loop._callbacks)
    heard.worker.leave()
    heard.worker.leave()
    callbacks = len(heard.loop._callbacks)
    heard.worker = Fleet(heard.loop, FAKE_WORKER).adopt((near, pidfd), heard.hear, heard.ends.append)
    heard.worker.send(messages.Report(5))
    heard.until(lambda: heard.messages)
    adopted = heard.worker.pid
    heard.kill()

    assert (2, pid) == (before - callbacks, adopted)
    assert [5] == [each.number for each in heard.messages if isinstance(each, messages.Standing)]
    assert ["the test wants it"] == heard.ends


@pytest.mark.parametrize("which", [1, 2])
def test_a_worker_that_cannot_be_watched_is_not_adopted(
    hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Its descriptors stay open, for the next try, and the loop has none of them."""
    heard = hear(FAKE_WORKER)
    near, pidfd = (os.dup(fd) for fd in heard.worker.descriptors)
    heard.worker.leave()
    add, places, watched = heard.loop.add, itertools.count(1), len(heard.loop._callbacks)

    def fail_once(fd: int, callback: Callable[[], object]) -> None:
        if next(places) == which:
            raise OSError(errno.ENOSPC, "watch a descriptor")
        add(fd, callback)

    fleet = Fleet(heard.loop, FAKE_WORKER)
    with monkeypatch.context() as patch:
        patch.setattr(heard.loop, "add", fail_once)
        with pytest.raises(OSError, match="watch a descriptor"):
            fleet.adopt((near, pidfd), heard.hear, heard.ends.append)
    assert watched == len(heard.loop._callbacks)
    heard.worker = fleet.adopt((near, pidfd), heard.hear, heard.ends.append)
    heard.worker.send(messages.Report(5))
    heard.until(lambda: heard.messages)
    heard.kill()


@pytest.mark.parametrize("which", [1, 2])
def test_a_worker_that_cannot_be_watched_is_not_started(
    hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """If the host has no room to watch a new worker, the caller gets the error, and nothing of the worker is left: no
    process, and no place among those that begin, for which others would wait.
    """
    before = set(_children())  # of earlier tests
    heard = hear(FAKE_WORKER)
    heard.kill()
    add, places, watched = heard.loop.add, itertools.count(1), len(heard.loop._callbacks)

    def fail_once(fd: int, callback: Callable[[], object]) -> None:
        if next(places) == which:
            raise OSError(errno.ENOSPC, "watch a descriptor")
        add(fd, callback)

    with monkeypatch.context() as patch:
        patch.setattr(heard.loop, "add", fail_once)
        for _ in range(births.BY_EXEC + 1):
            places = itertools.count(1)
            with pytest.raises(KernelError, match="watch a worker process: No space left"):
                heard.start()
    heard.fleet.openers.drop_spare()
    assert (watched, set()) == (len(heard.loop._callbacks), set(_children()) - before)
    heard.start().send(messages.Report(5))
    heard.until(lambda: heard.messages)
    heard.kill()


def test_a_worker_that_cannot_be_watched_when_it_comes_is_killed(
    hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the host has no room to watch a process that was queued, the process is killed, and its end says why."""
    heard = hear(FAKE_WORKER, ("/nonexistent/zygote",))
    heard.kill()
    heard.fleet.prepare()
    heard.fleet._births._rests = False  # a zygote is about to be there, so a worker is queued
    late = heard.start()
    heard.ends.clear()
    assert not late.is_there
    add = heard.loop.add

    def fail(fd: int, callback: Callable[[], object]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(heard.loop, "add", fail)
        heard.fleet._births._rests = True
        heard.fleet._births._go_on()
        patch.setattr(heard.loop, "add", add)

    assert "the worker was killed: it cannot be watched: No space left on device" == heard.until_end()


def test_workers_come_from_a_zygote_where_there_is_one(
    hear: Callable[..., Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are forked by the zygote. One that died is replaced after a while only, so that a zygote that cannot live
    does not keep the host busy; one of another program is replaced at once. When the fleet closes, its zygote ends, and
    the workers go on.
    """
    program = tmp_path / "program"
    program.mkdir()
    monkeypatch.setattr(births, "_PACKAGE", program)
    before = set(_children())

    def children() -> list[int]:
        spare = heard.fleet.openers.spare.pid if heard.fleet.openers.spare else 0  # an opener, which waits for its job
        return [each for each in _children() if each not in {*before, spare}]

    heard = hear(FAKE_WORKER, (*zygote.COMMAND, "--host", "xenbackend.rig.host"))
    heard.kill()
    assert [] == children()
    heard.fleet.prepare()
    [first] = children()
    heard.fleet.prepare()
    assert [first] == children()
    os.kill(first, signal.SIGKILL)
    heard.until(lambda: heard.fleet._births._zygote is None)
    settle(heard.loop)
    assert [] == children()
    heard.ahead_s += REST_S
    settle(heard.loop)
    [second] = children()
    heard.start()
    assert not heard.worker.is_there, "it waits for a zygote that is being started"
    heard.until(lambda: heard.worker.is_there)
    assert zygote.COMMAND[-1] in Path(f"/proc/{heard.worker.pid}/cmdline").read_text()
    worker = heard.worker.pid
    for _ in range(3):  # as for each disk's upgrade, with the same program
        heard.fleet.renew()
        settle(heard.loop)
        assert {worker, second} == set(children())
    (program / "new.py").write_text("")
    assert heard.fleet.openers.spare is not None
    heard.fleet.renew()
    assert [worker] == children()
    assert heard.fleet.openers.spare is None  # it was of the former program, too
    settle(heard.loop)
    [third] = [each for each in children() if each != worker]
    heard.fleet.close()
    heard.ahead_s += 10 * REST_S
    settle(heard.loop)

    assert [worker] == children()
    assert 3 == len({first, second, third})
    heard.worker.send(messages.Report(5))
    heard.until(lambda: heard.messages)
    heard.kill()


def test_a_zygote_that_cannot_be_started_is_told_once(
    hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch, lines: io.StringIO
) -> None:
    """If no zygote can be started, that is logged once, it is tried again, and workers are started by exec."""
    heard = hear(FAKE_WORKER, ("/nonexistent/zygote",))
    for _ in range(3):
        heard.fleet.prepare()
        heard.ahead_s += REST_S
        settle(heard.loop)
    heard.kill()

    assert 1 == lines.getvalue().count("start a worker process: No such file")
    with pytest.raises(KernelError):
        Fleet(heard.loop, ("/nonexistent/worker",)).start(heard.hear, heard.ends.append)


def _children() -> list[int]:
    """Return this process's children that have not been waited for."""
    task = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return [int(each) for each in task.read_text().split()]


def stand(**walls: Any) -> messages.Standing:
    """Return the standing of a worker with these walls."""
    return messages.Standing(1, messages.Stage.OPEN, "", read_only=False, shareable=False, **walls)


def test_walls_that_are_missing_are_said_once(hear: Callable[..., Heard], capsys: pytest.CaptureFixture[str]) -> None:
    """Missing walls are logged once for all workers, and again only if other walls are missing. Each worker's own are
    shown.
    """
    heard = hear(FAKE_WORKER)
    missing = stand(walls=["limits"], no_walls={"user": "become user 7: no", "capabilities": "become user 7: no"})
    other = stand(walls=["user"], no_walls={"landlock": "use Landlock: no"}, needs=["files"])
    for each in (stand(walls=["user"]), missing, stand(), missing, other):
        assert all(heard.worker.note_walls(each) for _ in range(2))
        heard.kill()
        last = heard.worker
        heard.start()
    lines = [line for line in capsys.readouterr().out.splitlines() if "walls" in line]
    heard.kill()

    assert 2 == len(lines)
    assert "user, capabilities (become user 7: no)" in lines[0]
    assert "landlock (use Landlock: no)" in lines[1]
    assert (["user"], {"landlock": "use Landlock: no"}, ["files"]) == (last.walls, last.no_walls, last.needs)
    assert 0 == heard.fleet.breaches


def test_workers_that_tell_of_ever_other_walls_fill_no_log(hear: Callable[..., Heard], lines: io.StringIO) -> None:
    """However many workers say which walls are missing, and however long their reasons are, the log has a few short
    lines an hour about it.
    """
    heard = hear(FAKE_WORKER)
    for hour in range(2):
        lines.truncate(lines.seek(0))
        for number in range(1000):
            heard.fleet.note_walls({"user": f"hour {hour}, {number}: " + "\udcff\n" * 30_000})
        said = lines.getvalue().splitlines()
        assert 0 < len(said) <= 10
        assert max(map(len, said)) < 1000
        heard.ahead_s += 3600
    heard.kill()


@pytest.mark.parametrize(
    "told",
    [
        [stand(walls=["user"]), stand()],
        [stand(walls=["user"]), stand(walls=["limits"])],
        [stand(), stand(no_walls={"user": "no"})],
        [stand(no_walls={"user": "no"}), stand(no_walls={"user": "it cannot be"})],
        [stand(), stand(needs=["network"])],
        [stand(walls=["Jericho"])],
        [stand(no_walls={"x" * 5000: "no"})],
        [stand(walls=["user", "user"])],
        [stand(walls=["user"], no_walls={"user": "no"})],
        [stand(needs=["everything"])],
        [stand(needs=["files", "files"])],
    ],
)
def test_a_worker_has_the_walls_that_it_was_born_with(
    hear: Callable[..., Heard], told: list[messages.Standing], lines: io.StringIO
) -> None:
    """A worker's walls never change. One that tells of other walls than before, or of walls or needs that there are
    not, is killed for that breach, and nothing is logged about its last walls.
    """
    heard = hear(FAKE_WORKER)
    assert all(heard.worker.note_walls(each) for each in told[:-1])
    before = (heard.worker.walls, heard.worker.no_walls, heard.worker.needs), lines.getvalue()
    assert not heard.worker.note_walls(told[-1])

    assert f"{BREACH}walls other than a worker's, or than it has told before" == heard.until_end()
    assert before == ((heard.worker.walls, heard.worker.no_walls, heard.worker.needs), lines.getvalue())
    assert heard.worker.has_broken_protocol


def test_a_worker_by_exec_is_told_of_third_parties(hear: Callable[..., Heard], tmp_path: Path) -> None:
    """A worker that is started by exec finds the names of third parties' drivers on its command line."""
    heard = hear(_python(tmp_path, "channel.recv(1)"))
    heard.kill()
    heard.fleet._command = (
        sys.executable,
        "-c",
        "import sys; open(sys.argv[1], 'w').write(repr(sys.argv[2:4]))",
        f"{tmp_path}/said",
    )
    heard.ends.clear()
    heard.fleet.start(heard._said, heard.ends.append, ["canary", "xor"])
    heard.until_end()

    assert "['--drivers', 'canary,xor']" == (tmp_path / "said").read_text()
