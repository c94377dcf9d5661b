"""The parent, which restarts a service and keeps its descriptors meanwhile, with real processes and real signals."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from xenbackend.errors import ConfigError
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service import parent
from xenbackend.supervisor.service.parent import Parent, Store

pytestmark = pytest.mark.slow  # every one starts processes

_HEAD = """
import os, signal, sys
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.notify import Notifier
place = sys.argv[1]
with open(place, "a+") as file:
    file.write("x")
    file.flush()
    file.seek(0)
    run = len(file.read())
keeper = Keeper(os.environ)

def memory(content):
    fd = os.memfd_create("x")
    os.write(fd, content)
    return fd

def left():
    return {name: (os.pread(fd, 20, 0).decode(), os.lseek(fd, 0, os.SEEK_CUR)) for name, fd in keeper.inherited.items()}

def say(what):
    with open(place + ".said", "a") as file:
        file.write(f"{what}\\n")

"""


class Runs:
    """A parent whose service is the text of a program, and what that program wrote."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.store = Store(directory / "keep")

    def run(self, text: str) -> int:
        """Run the program until the parent ends; return the parent's exit status."""
        (self._directory / "service.py").write_text(_HEAD + text)
        command = [sys.executable, str(self._directory / "service.py"), str(self._directory / "runs")]
        with closing(Reactor()) as loop:
            return Parent(command, self.store, self.environment, loop).run()

    @property
    def count(self) -> int:
        """How often the service was started."""
        return len((self._directory / "runs").read_text())

    @property
    def said(self) -> list[str]:
        """The lines that the service wrote."""
        return (self._directory / "runs.said").read_text().splitlines()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """A parent that restarts a service with hardly a pause; no descriptor may be left."""
    monkeypatch.setattr(parent, "RESTART_S", 0.05)
    before = len(open_descriptors())
    runs = Runs(tmp_path)
    yield runs
    runs.store.close()
    assert before == len(open_descriptors())


def test_a_service_that_dies_is_followed_by_one_that_has_its_descriptors(runs: Runs) -> None:
    """After a service has died, the next one gets each kept descriptor under its name as the same open file, in any
    number; forgotten ones are gone.
    """
    status = runs.run("""
if run == 1:
    for number in range(20):
        keeper.keep(f"m{number}", memory(bytes([97 + number]) * number))
    keeper.keep("m3", memory(b"another"))
    keeper.forget("m0")
    os.kill(os.getpid(), signal.SIGKILL)
if run == 2:
    say(left())
    sys.exit(3)
say(sorted(left()) == sorted(f"m{number}" for number in range(1, 20)))
""")
    content = {f"m{n}": (chr(97 + n) * n, n) for n in range(1, 20)} | {"m3": ("another", 7)}

    assert (0, 3) == (status, runs.count)
    assert content == eval(runs.said[0])  # noqa: S307 - what the test's own program wrote
    assert "True" == runs.said[1]


@pytest.mark.parametrize(("status", "count"), [(0, 1), (2, 1), (1, 2), (7, 2)])
def test_a_service_that_wants_to_end_ends(runs: Runs, status: int, count: int) -> None:
    """A service is not restarted after exit status 0, nor after a mistake of the operator (2), which does not mend
    itself. After any other status it is.
    """
    found = runs.run(f"sys.exit({status} if run == 1 else 0)")

    assert (status if count == 1 else 0, count) == (found, runs.count)


def test_hangup_replaces_the_service(runs: Runs) -> None:
    """At SIGHUP the parent ends the service by SIGTERM and starts another one, whatever the exit status was."""
    status = runs.run("""
if run < 3:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    keeper.keep(f"of {run}", memory(b"x"))
    os.kill(os.getppid(), signal.SIGHUP)
    signal.sigwait([signal.SIGTERM])
    sys.exit(0)
say(sorted(left()))
""")

    assert (0, 3, ["['of 1', 'of 2']"]) == (status, runs.count, runs.said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_drains_and_ends_both(runs: Runs, number: int) -> None:
    """At SIGTERM or SIGINT the parent sends SIGINT to the service, which drains; the service's exit status becomes the
    parent's.
    """
    status = runs.run(f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
os.kill(os.getppid(), {int(number)})
signal.sigwait([signal.SIGINT])
sys.exit(5)
""")

    assert (5, 1) == (status, runs.count)


def test_a_signal_between_two_services_starts_no_other_one(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to end that comes during the pause before a restart ends the parent at once."""
    monkeypatch.setattr(parent, "RESTART_S", 30.0)
    status = runs.run("""
import select
above, end = os.getppid(), os.pidfd_open(os.getpid())
if os.fork() == 0:
    select.select([end], [], [])
    os.kill(above, signal.SIGTERM)
    os._exit(0)
os._exit(1)
""")

    assert (1, 1) == (status, runs.count)


def test_what_the_service_says_of_itself_is_handed_on(runs: Runs, tmp_path: Path) -> None:
    """The parent passes the service's messages on to its own notify socket, except those about descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as above:
        above.bind(str(tmp_path / "above"))
        runs.environment["NOTIFY_SOCKET"] = str(tmp_path / "above")
        runs.run("keeper.keep('a', memory(b'')); Notifier(os.environ).ready(); Notifier(os.environ).stopping()")
        above.setblocking(False)

        assert [b"READY=1", b"STOPPING=1"] == [above.recv(100) for _ in range(2)]
        with pytest.raises(BlockingIOError):
            above.recv(100)


def test_an_inheritance_of_the_parents_is_not_the_services(runs: Runs) -> None:
    """Variables by which systemd handed descriptors to the parent do not hide from the service what is kept for it."""
    runs.environment |= {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "odd"}
    runs.run("""
if run == 1:
    keeper.keep("a", memory(b""))
    sys.exit(1)
say(list(left()))
""")

    assert ["['a']"] == runs.said


def test_a_service_that_nobody_could_watch_is_not_left_running(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel gives no pidfd for a service, that process is ended before another one is started."""
    started: list[int] = []
    real = os.pidfd_open

    def pidfd_open(pid: int) -> int:
        started.append(pid)
        if len(started) == 1:
            raise OSError(errno.ENOMEM, "no memory")
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    status = runs.run("sys.exit(0)")

    assert (0, 2) == (status, len(started))
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_a_service_that_cannot_be_started_leaves_no_descriptor(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the descriptors do not suffice to pass on all that are kept, the start is tried again until they do; no failed
    try leaves one open.
    """
    for number in range(30):
        runs.store.fds[str(number)] = os.memfd_create("x")
    tries: list[int] = []
    real = parent._spawn

    def spawn(*arguments: Any) -> tuple[int, int]:
        tries.append(len(open_descriptors()))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(tries) < 3:
            resource.setrlimit(resource.RLIMIT_NOFILE, (tries[-1] + 10, hard))
        try:
            return real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(parent, "_spawn", spawn)
    status = runs.run("say(len(left()))")

    assert (0, ["30"], [tries[0]] * 3) == (status, runs.said, tries)


def test_a_place_that_cannot_be_listened_at_is_said(tmp_path: Path) -> None:
    """If the parent cannot listen for descriptors, that is an error, and no service is started."""
    with pytest.raises(ConfigError, match=r"cannot listen: .*; make the directory"):
        parent.run(["run"], str(tmp_path / "nowhere" / "control.sock"), {})


def test_a_second_one_leaves_the_first_its_place(tmp_path: Path) -> None:
    """A second parent is refused, and the first is reached as before; the place of a dead one is free."""
    place = tmp_path / "control.sock.keep"
    first = Store(place)
    with pytest.raises(ConfigError, match="another `xenbackend run --keep` listens there already"):
        parent.run(["run"], str(tmp_path / "control.sock"), {})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as near:
        near.connect(str(place))
        near.send(b"READY=1")
    heard = first.take()
    first.socket.close()  # as by SIGKILL: its place stays
    second = Store(place)
    second.close()

    assert "READY=1" == heard
    assert [] == list(tmp_path.iterdir())


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """Only a socket of a former parent is replaced: a file of that name is left alone, and no service is started."""
    file = tmp_path / "control.sock.keep"
    file.write_text("x")
    with pytest.raises(ConfigError, match=r"control\.sock\.keep: cannot listen there: it is not a socket"):
        parent.run(["run"], str(tmp_path / "control.sock"), {})

    assert "x" == file.read_text()


def test_a_parent_removes_no_other_ones_place(tmp_path: Path) -> None:
    """A parent whose place somebody has removed leaves it to the one that listens there now."""
    place = tmp_path / "keep"
    first = Store(place)
    place.unlink()
    with closing(Store(place)) as second, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as near:
        first.close()
        near.connect(str(place))
        near.send(b"READY=1")
        heard = second.take()

    assert "READY=1" == heard


def test_kept_descriptors_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of kept descriptors is bounded, whatever a faulty service sends; one too many, or one without a name,
    is closed.
    """
    monkeypatch.setattr(parent, "MAX_KEPT", 3)
    before = len(open_descriptors())
    store = Store(tmp_path / "keep")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as near:
        near.connect(str(tmp_path / "keep"))
        for number in range(5):
            socket.send_fds(near, [f"FDSTORE=1\nFDNAME={number}".encode()], [0, 0])
            store.take()
        socket.send_fds(near, [b"STATUS=\xff"], [0])
        store.take()
    held = list(store.fds)
    assert not any(os.get_inheritable(fd) for fd in store.fds.values())  # each service gets its own, and no other
    store.close()

    assert ["0", "1", "2"] == held
    assert before == len(open_descriptors())
