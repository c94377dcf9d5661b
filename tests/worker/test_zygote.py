"""The process that workers are forked from."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys

import pytest

from xenbackend.walls.raising import Walls
from xenbackend.worker import zygote

HOST = "xenbackend.rig.host"
MODULE = "xenbackend.worker.zygote"
# A zygote whose workers report what is imported and open in them.
_FORKED = f"""
import os, socket, sys
from xenbackend.block.drivers import BUILT_IN
from xenbackend.worker import main, zygote
def show(channel, walls, told):
    modules = sorted({{each.partition(":")[0] for each in BUILT_IN.values()}} - sys.modules.keys())
    links = [f"/proc/self/fd/{{each}}" for each in os.listdir("/proc/self/fd")]
    held = [os.readlink(each).partition(":")[0] for each in links if os.path.lexists(each)]  # not the listing itself
    channel.send(repr((modules, held, os.getsid(0) == os.getpid())).encode())
    return 0
zygote.SERVE["w"] = show
sys.exit(zygote.main(["--host", "{HOST}", "--socket", sys.argv[1]]))
"""


def _start(*arguments: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        process = subprocess.Popen([sys.executable, *arguments, str(far.fileno())], pass_fds=[far.fileno()])
    near.settimeout(20)
    return process, near


def _ask_for_worker(near: socket.socket) -> tuple[socket.socket, int]:
    """Return the service's end of a new worker's socket, and its pidfd."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    cord, pidfd = _ask_for_cord(near)
    with theirs, cord:
        socket.send_fds(cord, [b"socket"], [theirs.fileno()])
    return ours, pidfd


def _ask_for_cord(near: socket.socket) -> tuple[socket.socket, int]:
    """Return the cord of a new worker, and its pidfd."""
    cord, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        socket.send_fds(near, [b"w"], [far.fileno()])
    datagram, fds, _, _ = socket.recv_fds(near, 16, 1)
    assert b"pidfd" == datagram
    assert b"born" == near.recv(16)
    return cord, fds[0]


@pytest.mark.slow
def test_a_worker_has_everything_imported_and_nothing_open() -> None:
    """A forked worker has every built-in driver, its socket and its own session, and nothing else of the zygote's."""
    process, near = _start("-c", _FORKED)
    assert b"ready" == near.recv(16)
    answers = set()
    for _ in range(3):
        ours, pidfd = _ask_for_worker(near)
        answers.add(ours.recv(10_000).decode())
        os.close(pidfd)
        ours.close()
    near.close()
    process.wait(20)

    [answer] = answers  # all are alike: none has inherited from an earlier one
    missing, held, leads_session = eval(answer)  # noqa: S307 - our own program's
    assert ([], True) == (missing, leads_session)
    # Newer libffi keeps its own file open in each process; the walls close it.
    assert 4 == len([each for each in held if "/libffi.so" not in each]), "three standard ones and the socket"


@pytest.mark.slow
def test_who_was_forked_ends_at_once() -> None:
    """A forked process ends without the interpreter's shutdown, which would write to each shared page (20 ms)."""
    ends = """
import atexit
def show(channel, walls, told):
    atexit.register(channel.send, b"late")
    return 7
"""
    process, near = _start("-c", _FORKED.replace("zygote.SERVE", f"{ends}zygote.SERVE"))
    assert b"ready" == near.recv(16)
    ours, pidfd = _ask_for_worker(near)

    assert b"" == ours.recv(16)
    os.close(pidfd)
    ours.close()
    near.close()
    process.wait(20)


@pytest.mark.slow
def test_who_is_forked_knows_all_messages() -> None:
    """The fields of all messages are looked up before the fork, once for all workers."""
    learns = """
from xenbackend.protocol import codec, messages, opening
def show(channel, walls, told):
    before = codec._fields_of.cache_info().misses
    codec.prepare(messages.FromSupervisor, messages.FromWorker)
    codec.prepare(opening.FromSupervisor, opening.FromOpener, opening.Question)
    channel.send(str(codec._fields_of.cache_info().misses - before).encode())
    return 0
"""
    process, near = _start("-c", _FORKED.replace("zygote.SERVE", f"{learns}zygote.SERVE"))
    assert b"ready" == near.recv(16)
    ours, pidfd = _ask_for_worker(near)

    assert b"0" == ours.recv(16)
    os.close(pidfd)
    ours.close()
    near.close()
    process.wait(20)


@pytest.mark.slow
def test_it_ends_when_its_service_does_and_its_workers_by_themselves() -> None:
    """The zygote ends when the service's socket closes; a worker ends when its own does."""
    process, near = _start("-m", MODULE, "--host", HOST, "--socket")
    assert b"ready" == near.recv(16)
    ours, pidfd = _ask_for_worker(near)
    near.close()

    assert 0 == process.wait(20)
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    ours.settimeout(20)
    ours.shutdown(socket.SHUT_WR)  # to the worker the service is gone, too
    while ours.recv(10_000):
        pass
    os.close(pidfd)
    ours.close()


@pytest.mark.slow
def test_who_gets_no_socket_ends() -> None:
    """A worker that gets no socket, because its cord is closed, ends in order; the zygote goes on."""
    process, near = _start("-m", MODULE, "--host", HOST, "--socket")
    assert b"ready" == near.recv(16)
    cord, pidfd = _ask_for_cord(near)
    assert not select.select([pidfd], [], [], 0.1)[0], "it waits for its socket"
    cord.close()

    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    ours, other = _ask_for_worker(near)
    os.close(other)
    ours.close()
    near.close()
    process.wait(20)


def test_a_fork_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a fork fails, the service is told, and the zygote goes on."""

    def fork() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", fork)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for _ in range(2):
        socket.send_fds(near, [b"w"], [near.fileno()])
    near.shutdown(socket.SHUT_WR)

    assert zygote.wait_for_birth(far, Walls("off")) is None
    assert [b"ready", b"failed", b"failed"] == [near.recv(16) for _ in range(3)]
    near.close()
    far.close()


@pytest.mark.slow
def test_a_process_between_that_fails_is_told() -> None:
    """If the process between zygote and worker fails, the service is told."""
    broken = _FORKED.replace('zygote.SERVE["w"] = show', "os.pidfd_open = lambda _: os.close(-1)")
    process, near = _start("-c", broken)
    assert b"ready" == near.recv(16)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(near, [b"w"], [theirs.fileno()])

    assert b"failed" == near.recv(16)
    near.close()
    process.wait(20)


@pytest.mark.parametrize("arguments", [[], ["--socket", "3"], ["--host", "x", "--socket", "three"]])
def test_it_is_not_started_by_hand(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Started without its arguments, the program says that the service starts it."""
    assert 2 == zygote.main(arguments)
    assert "started by the service" in capsys.readouterr().err
