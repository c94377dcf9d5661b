"""The zygote as the service holds it: workers from it are our children, and nobody depends on it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.privileges import MAY_COME_FIRST
from xenbackend.protocol import codec, messages
from xenbackend.supervisor.service import zygote
from xenbackend.supervisor.service.process import Process
from xenbackend.supervisor.service.zygote import COMMAND, Zygote

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]

REAL = (*COMMAND, "--host", "xenbackend.rig.host")


def _fake(text: str) -> tuple[str, ...]:
    head = "import os, socket, sys; channel = socket.socket(fileno=int(sys.argv[2]))\n"
    return (sys.executable, "-S", "-c", head + text)


def _fork(it: Zygote) -> Process:
    """Return a worker once the zygote is ready."""
    while not (forked := it.fork("w")):
        assert not _has_ended(it)
        os.sched_yield()
    return forked[0]


def _until_ended(it: Zygote) -> None:
    os.waitid(os.P_PID, it.pid, os.WEXITED | os.WNOWAIT)
    assert _has_ended(it)


def _has_ended(it: Zygote) -> bool:
    return bool(select.select([it.pidfd], [], [], 0)[0])


def test_a_worker_is_as_one_that_we_started() -> None:
    """It is our child, serves its socket, and how it ended is told; also when its zygote has gone before it."""
    it = Zygote(REAL)
    first, second = _fork(it), _fork(it)
    it.close()
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


def test_only_workers_come_to_us() -> None:
    """A helper that a driver started is not left to us when its worker has ended: nobody here would wait for it."""
    it = Zygote(REAL)
    _fork(it).leave()
    with subprocess.Popen(["sh", "-c", "true & echo $!"], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        orphan = int(shell.stdout.readline())
    it.close()

    with pytest.raises(ChildProcessError):
        os.waitpid(orphan, os.WNOHANG)


def test_a_worker_is_whole_when_it_is_handed_over() -> None:
    """However early it dies, its end is ours to hear: the process between has gone before we know of it. And it leads
    its session, else it could not come before others.
    """
    it = Zygote(REAL)
    ends = set()
    for _ in range(20):
        worker = _fork(it)
        assert worker.pid == os.getsid(worker.pid)
        worker.kill()
        ends.add(worker.describe_end())
    it.close()

    assert {"the worker was ended by SIGKILL"} == ends


def test_a_worker_and_its_opener_come_together() -> None:
    """Each is our child, leads its session, and has its own socket only: the one ends when that is closed."""
    it = Zygote(REAL)
    _fork(it).leave()
    worker, opener = it.fork("wo")
    it.close()
    assert [worker.pid, opener.pid] == [os.getsid(worker.pid), os.getsid(opener.pid)]
    opener.socket.shutdown(socket.SHUT_WR)

    assert 0 == opener.wait()
    assert not select.select([worker.pidfd], [], [], 0)[0]
    worker.socket.shutdown(socket.SHUT_WR)
    assert "the worker ended unexpectedly with exit status 0" == worker.describe_end()


def test_it_comes_before_others() -> None:
    """A disk waits for whatever it does; its workers have their turn as we have ours."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    it = Zygote(REAL)
    first = os.getpriority(os.PRIO_PROCESS, it.pid)
    worker = _fork(it)
    seen = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (it.pid, worker.pid)]
    worker.kill()
    worker.describe_end()
    it.close()

    assert first < ours or not MAY_COME_FIRST
    assert [first, ours] == seen


def test_nobody_waits_until_it_is_ready() -> None:
    """One that has not imported everything yet has no worker for us, and lives on."""
    it = Zygote(_fake("channel.recv(1)"))

    assert [] == it.fork("w")
    assert not _has_ended(it)
    it.close()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("channel.send(b'failed')", "it could not fork"),
        ("channel.send(b'born')", "it sent no pidfd"),
        ("", "it ended"),
        ("socket.send_fds(channel, [b'pidfd'], [os.pidfd_open(os.getpid())])", "it ended in the middle of it"),
        ("socket.send_fds(channel, [b'pidfd'], [0]); channel.send(b'failed')", "it failed in the end"),
    ],
)
def test_one_that_fails_is_good_for_nothing(monkeypatch: pytest.MonkeyPatch, text: str, why: str) -> None:
    """Whatever is wrong, there is no worker, no disk waits long, nothing is left open, and the zygote ends."""
    it = Zygote(_fake(f"channel.send(b'ready'); channel.recv(16)\n{text}\n# {why}"))
    while not it._hears():
        os.sched_yield()

    assert [] == it.fork("w")
    monkeypatch.setattr(it, "_ask", pytest.fail)  # nobody waits for it once more, ended or not
    assert [] == it.fork("w")
    _until_ended(it)
    assert [] == it.fork("w")
    it.close()


@pytest.mark.parametrize("names_it", [True, False], ids=["was forked", "was not forked"])
def test_nobody_waits_long_for_a_birth(monkeypatch: pytest.MonkeyPatch, *, names_it: bool) -> None:
    """While the service waits it does nothing else. Whatever comes too late is ended and collected, and the zygote is
    asked for no other worker until then; afterwards it is as good as before.
    """
    it = Zygote(REAL)
    _fork(it).leave()
    os.kill(it.pid, signal.SIGSTOP)
    monkeypatch.setattr(zygote, "_PATIENCE_S", 0.05)
    begun = time.monotonic()
    late = it.fork("wo")
    took_s = time.monotonic() - begun
    if names_it:  # as one does that was stopped between its two answers
        os.kill(it.pid, signal.SIGCONT)
        select.select([it._process.socket], [], [])
        os.kill(it.pid, signal.SIGSTOP)
    monkeypatch.setattr(it, "_ask", pytest.fail)
    meanwhile = it.fork("w") if not names_it else []
    monkeypatch.undo()
    os.kill(it.pid, signal.SIGCONT)
    following = _fork(it)
    following.kill()
    how = following.describe_end()
    it.close()

    assert ([], [], "the worker was ended by SIGKILL") == (late, meanwhile, how)
    assert took_s < 1.0
    assert [] == it._too_late


def test_one_that_never_answers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker is started by exec meanwhile; when the zygote is sent away, nothing of it is left open."""
    monkeypatch.setattr(zygote, "_PATIENCE_S", 0.05)
    names = "socket.send_fds(channel, [b'pidfd'], [os.pidfd_open(os.getpid())])"
    it = Zygote(_fake(f"channel.send(b'ready'); {names}; channel.recv(16); channel.recv(1)"))
    while not it._hears():
        os.sched_yield()

    assert [[], []] == [it.fork("w"), it.fork("wo")]
    assert not _has_ended(it)
    it.close()


def test_one_that_was_killed_has_no_worker() -> None:
    """A zygote that somebody killed is found out when it is asked."""
    it = Zygote(REAL)
    _fork(it).leave()
    os.kill(it.pid, signal.SIGKILL)
    _until_ended(it)

    assert [] == it.fork("w")
    it.close()
