"""Child processes: how they start, and what is said about their end."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.privileges import MAY_COME_FIRST
from xenbackend.errors import KernelError
from xenbackend.kernel.process import AHEAD, boost, unboost
from xenbackend.supervisor.service.process import Process, start

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]

_CHANNEL = "import os, socket, sys; channel = socket.socket(fileno=int(sys.argv[2])); "


def _python(text: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", _CHANNEL + text)


def test_it_has_a_socket_and_nothing_else_of_ours() -> None:
    """A child gets its end of the socket, a session of its own and no input, and none of the service's other
    descriptors.
    """
    near, far = os.pipe()
    os.set_inheritable(near, True)
    open_ = "sorted(int(each) for each in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + each))"
    facts = f"{open_}, os.getsid(0) == os.getpid(), os.readlink('/proc/self/fd/0')"
    process = start(_python(f"channel.send(repr(({facts})).encode())"))
    os.close(near)
    os.close(far)
    process.socket.setblocking(True)
    said = process.socket.recv(1000).decode()
    process.describe_end()

    descriptors, leads_session, standard_input = eval(said)  # noqa: S307 - our own program's
    assert 4 == len(descriptors)
    assert (True, "/dev/null") == (leads_session, standard_input)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("os.kill(os.getpid(), 11)", "the worker was ended by SIGSEGV"),
        ("os.kill(os.getpid(), 9)", "the worker was ended by SIGKILL"),
        ("sys.exit(4)", "the worker ended unexpectedly with exit status 4"),
        ("sys.exit(0)", "the worker ended unexpectedly with exit status 0"),
    ],
)
def test_an_end_has_a_sentence(text: str, sentence: str) -> None:
    """However a child ended, a sentence says how; and it does not stay a zombie."""
    process = start(_python(text))
    pid = process.pid

    assert sentence == process.describe_end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_end_is_waited_for() -> None:
    """`describe_end` waits until a child that was killed has ended."""
    process = start(_python("channel.recv(1)"))
    process.kill()
    process.kill()

    assert "the worker was ended by SIGKILL" == process.describe_end()


def test_it_may_come_before_others() -> None:
    """`boost` raises a child's priority above the service's, and `unboost` takes that back. If the host does not permit
    it, or the child is gone, nothing happens.
    """
    process = start(_python("channel.recv(1)"))
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    boost(process.pid)
    ahead = os.getpriority(os.PRIO_PROCESS, process.pid)
    unboost(process.pid)
    after = os.getpriority(os.PRIO_PROCESS, process.pid)
    process.kill()
    process.describe_end()
    process = start(_python(""))
    os.waitid(os.P_PID, process.pid, os.WEXITED)
    boost(process.pid)  # the process is gone
    process.describe_end()

    assert after == ours
    assert (ours - AHEAD if MAY_COME_FIRST else ours) == ahead


@pytest.mark.skipif(not MAY_COME_FIRST, reason="we may not come before others")
def test_our_own_hurry_is_not_inherited() -> None:
    """A child does not inherit the service's own raised priority."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    boost(os.getpid())
    try:
        process = start(_python("channel.recv(1)"))
        seen = os.getpriority(os.PRIO_PROCESS, process.pid)
    finally:
        unboost(os.getpid())
    process.kill()
    process.describe_end()

    assert ours == seen


def test_the_end_of_another_s_child_has_a_sentence_too() -> None:
    """The end of a process that is not our child is described without an exit status, which only its parent can
    collect.
    """
    near, far = socket.socketpair()
    with subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        process = Process(near, os.pidfd_open(pid))
        far.close()
        os.kill(pid, signal.SIGKILL)
        sentence = process.describe_end()

    assert (pid, "the worker has ended") == (process.pid, sentence)


def test_a_program_that_is_missing_is_an_error_of_the_host() -> None:
    """If a program cannot be started, that is an error of the host, and nothing stays open."""
    with pytest.raises(KernelError, match="start a worker process: No such file"):
        start(("/nonexistent/worker",))


def test_a_host_without_descriptors_is_an_error_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no socket can be made for a child, that is an error of the host, which does not end the service."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    with pytest.raises(KernelError, match="make a socket for a worker process: Too many open files"):
        start(_python(""))


def test_one_that_nobody_could_end_is_not_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel gives no pidfd for a child, the child is ended, and the caller gets an error."""
    started: list[int] = []

    def refuse(pid: int) -> int:
        started.append(pid)
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(KernelError, match="start a worker process: Too many open files in system"):
        start(_python("channel.recv(1)"))

    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
