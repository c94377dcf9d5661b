"""The parent, which restarts a service and keeps its descriptors meanwhile, with real processes and real signals."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import socket
import subprocess
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
from xenbackend.supervisor.service.keeper import FIRST, MAX_NAMES
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


def test_a_service_that_cannot_be_started_leaves_no_descriptor(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """If the descriptors that are kept cannot be passed on, the start is tried again until they can; no failed try
    leaves one open. One line says why, once.
    """
    for number in range(30):
        runs.store.fds[str(number)] = os.memfd_create("x")
    tries: list[int] = []
    real = parent._spawn

    def spawn(*arguments: Any) -> tuple[int, int]:
        tries.append(len(open_descriptors()))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(tries) < 3:
            resource.setrlimit(resource.RLIMIT_NOFILE, (FIRST + 10, hard))
        try:
            return real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(parent, "_spawn", spawn)
    status = runs.run("say(len(left()))")
    line = "no service can be started with the 30 descriptors that are kept: Bad file descriptor; it is tried again"

    assert (0, ["30"], [tries[0]] * 3) == (status, runs.said, tries)
    assert f"xenbackend: {line}\n" == capfd.readouterr().err


def test_what_is_kept_is_passed_on_without_copies(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service is started although no other descriptors are left than the kept ones and a few, and gets each of them
    under its name.
    """
    fds = [os.memfd_create("x") for _ in range(100)]
    for number, fd in enumerate(random.Random(1).sample(fds, 100)):
        os.write(fd, str(number).encode())
        runs.store.fds[str(number)] = fd
    real = parent._spawn

    def spawn(*arguments: Any) -> tuple[int, int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 9, hard))
        try:
            return real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(parent, "_spawn", spawn)
    status = runs.run("say(run == 1 and {name: content for name, (content, _) in left().items()})")

    assert 0 == status
    assert {str(number): str(number) for number in range(100)} == eval(runs.said[0])  # noqa: S307 - as above


@pytest.mark.parametrize(
    ("is_privileged", "hard", "limit", "room"),
    [(True, 4096, 6272, 4096), (True, 10000, 10000, 4096), (False, 4096, 4096, 2645), (False, 64, 64, 0)],
)
def test_as_many_are_kept_as_a_service_can_take_over(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, *, is_privileged: bool, hard: int, limit: int, room: int
) -> None:
    """A privileged parent raises the hard limit of descriptors to what it needs. Another one keeps fewer: a service
    that inherits them needs more for the same disks.
    """
    limits = [(64, hard)]

    def setrlimit(_: int, wanted: tuple[int, int]) -> None:
        if wanted[1] > limits[-1][1] and not is_privileged:
            raise ValueError("not allowed to raise maximum limit")
        limits.append(wanted)

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    runs.store.make_room()

    assert ((limit, limit), room) == (limits[-1], runs.store.room)


def test_a_service_is_told_how_many_can_be_kept(runs: Runs) -> None:
    """A service hears how many descriptors its parent can pass on; it does not give more to it."""
    runs.run("say(os.environ['FDSTORE'])")

    assert [str(runs.store.room)] == runs.said


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_parent_without_streams_keeps_nothing_in_their_place(tmp_path: Path, *, is_closed: bool) -> None:
    """A parent that was started without stdin, stdout and stderr keeps no descriptor under their numbers."""
    program = """
import os, sys
from xenbackend.supervisor.service import parent
place = sys.argv[1]
if sys.argv[2] == "True":
    os.closerange(0, 3)
parent._fill_streams()
fds = os.open("/", os.O_RDONLY)
with open(place, "w") as file:
    file.write(f"{fds >= 3} {[os.get_inheritable(fd) for fd in range(3)]}")
"""
    place = tmp_path / "said"
    subprocess.run([sys.executable, "-c", program, str(place), str(is_closed)], stdin=subprocess.DEVNULL, check=True)

    assert "True [True, True, True]" == place.read_text()


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


def test_names_are_kept_as_far_as_a_program_can_be_started_with_them(runs: Runs) -> None:
    """A descriptor is not kept if a service could not be told the names of all: Linux bounds a variable's length."""
    others = MAX_NAMES // 256
    for number in range(others):
        runs.store.fds[f"{number:0255}"] = os.memfd_create("x")
    room = MAX_NAMES - 256 * others - 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as near:
        near.connect(str(runs.store.path))
        for name in ("x" * (room + 1), "y" * room):
            socket.send_fds(near, [f"FDSTORE=1\nFDNAME={name}".encode()], [0])
            runs.store.take()
    status = runs.run("say(sorted(map(len, left()))[0])")

    assert (0, [str(room)]) == (status, runs.said)


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
