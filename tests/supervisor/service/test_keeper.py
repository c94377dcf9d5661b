"""Descriptors that outlive their service, with the keeper that `supervisor.parent` is."""

from __future__ import annotations

import fcntl
import io
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import Kept
from xenbackend.errors import KernelError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import datagrams
from xenbackend.supervisor.service.keeper import _AGAIN_S, FIRST, MAX_NAMES, Keeper, forget_inheritance


def test_what_is_kept_is_the_same_open_file(kept: Kept) -> None:
    """A descriptor is kept under its name until it is forgotten; a later one of the same name replaces it."""
    keeper = kept.keeper()
    first, second = os.memfd_create("first"), os.memfd_create("second")
    keeper.keep("a", first)
    keeper.keep("b", first)
    keeper.keep("b", second)
    os.write(second, b"content")
    keeper.forget("nothing")
    found = {name: os.pread(fd, 10, 0) for name, fd in kept.fds.items()}
    keeper.forget("b")
    for fd in (first, second):
        os.close(fd)

    assert {"a": b"", "b": b"content"} == found
    assert ["a"] == list(kept.fds)


@pytest.mark.parametrize(
    "environment", [{}, {"NOTIFY_SOCKET": "/nowhere"}, {"FDSTORE": "64"}, {"NOTIFY_SOCKET": "/nowhere", "FDSTORE": "0"}]
)
def test_without_a_keeper_nothing_is_kept(environment: dict[str, str]) -> None:
    """A service without a keeper does not fail when it keeps something, and takes nothing for inherited."""
    keeper = Keeper({**environment, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"})
    keeper.keep("a", 0)
    keeper.forget("a")

    assert (False, {}) == (keeper.is_there, keeper.inherited)


def test_a_keeper_that_has_gone_is_an_error(kept: Kept) -> None:
    """If the keeper has gone, to keep a descriptor is an error, which says what was not done."""
    keeper = kept.keeper()
    kept.close()

    with pytest.raises(KernelError, match="keep a descriptor"):
        keeper.keep("a", 0)


class Busy:
    """A keeper that takes messages only when it is told to, as systemd while it reloads its units.

    The service waits only 10 ms where it would wait longer; `waits` says for each message whether it would.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[bool] = []
        waits = self.waits

        class Timed(socket.socket):
            def settimeout(self, value: float | None) -> None:
                waits.append(bool(value))
                super().settimeout(value and 0.01)

        self.fds: dict[str, int] = {}
        self.names: list[str] = []  # of all messages, in order
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self.keeper = Keeper({"NOTIFY_SOCKET": str(path), "FDSTORE": "100000"})
        monkeypatch.setattr(socket, "socket", Timed)

    def fill(self) -> None:
        """Keep something under so many names that the last one is not taken."""
        number = 0
        while not self.keeper._untaken:
            self.keeper.keep(f"first {number}", 0)
            number += 1

    def take(self, most: int = 100_000) -> None:
        """Take the messages that have come."""
        for _ in range(most):
            try:
                data, fds, _ = datagrams.receive(self._socket, 4096, 8)
            except BlockingIOError:
                return
            name = data.decode().partition("FDNAME=")[2].partition("\n")[0]
            self.names.append(name)
            if (former := self.fds.pop(name, -1)) >= 0:
                assert not fds, "systemd would keep both"
                os.close(former)
            if fds:
                self.fds[name] = fds.pop()

    def close(self) -> None:
        """Close everything."""
        for fd in self.fds.values():
            os.close(fd)
        self._socket.close()


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, descriptors: None) -> Iterator[Busy]:
    """Return a busy keeper."""
    made = Busy(tmp_path / "keep", monkeypatch)
    yield made
    made.close()


def test_what_a_busy_keeper_did_not_take_is_sent_again(busy: Busy, lines: io.StringIO) -> None:
    """A keeper that takes no messages holds the service up once, however much is to be kept or forgotten, as all guests
    wait for the service. As soon as it takes messages, it gets the newest state of each name, in the order of changes,
    without a further change, however often it was tried in vain. That it takes none is said once, and so is the end of
    that.
    """
    now = [0.0]
    loop = Reactor(lambda: now[0])
    busy.keeper.send_again_from(loop)
    first, second = os.memfd_create("first"), os.memfd_create("second")
    busy.keeper.keep("forgotten", first)
    busy.fill()
    first_waits = busy.waits[:]
    for name in ("journal", "changed", "gone"):
        busy.keeper.keep(name, first)
    busy.keeper.forget("forgotten")
    busy.keeper.replace("changed", second)
    busy.keeper.forget("gone")
    busy.keeper.keep("notes", second)
    os.write(second, b"second")
    os.close(first)
    os.close(second)
    later_waits = busy.waits[len(first_waits) :]
    said_before = lines.getvalue().count("sent again")
    for tries in range(10):
        now[0] += _AGAIN_S
        loop.call_soon(loop.stop)
        loop.run()
        assert busy.keeper._untaken or tries
        busy.take()
    found = {name: os.pread(fd, 10, 0) for name, fd in busy.fds.items() if not name.startswith("first ")}
    loop.close()

    assert {"journal": b"", "changed": b"second", "notes": b"second"} == found
    assert ["journal", "forgotten", "changed", "gone", "notes"] == list(dict.fromkeys(busy.names[-8:]))[-5:]
    assert ({True}, {False}) == (set(first_waits), set(later_waits))
    assert 1 == said_before == lines.getvalue().count("sent again") == lines.getvalue().count("has taken all")


def test_a_keeper_that_takes_messages_again_is_waited_for_again(busy: Busy) -> None:
    """Once a keeper has taken everything, it is waited for again."""
    busy.fill()
    busy.take()
    busy.keeper.keep("more", 0)
    busy.keeper.keep("again", 0)

    assert ([False, False, False, True], {}) == (busy.waits[-4:], busy.keeper._untaken)


@pytest.mark.parametrize("takes", [False, True])
def test_a_service_that_ends_sends_for_the_last_time(busy: Busy, lines: io.StringIO, *, takes: bool) -> None:
    """A service that leaves its disks waits a little for the keeper to take what it has not taken; that something is
    lost is said. No descriptor is left open.
    """
    busy.fill()
    if takes:
        busy.take()
    busy.keeper.close(waits=True)
    busy.take()

    assert (True, {}) == (busy.waits[-1], busy.keeper._untaken)
    assert takes == ("the next service will lack" not in lines.getvalue())


def test_a_service_that_takes_its_disks_along_waits_for_nothing(busy: Busy, lines: io.StringIO) -> None:
    """A service that leaves nothing to a next one does not wait for a busy keeper when it ends, nor complain."""
    busy.fill()
    busy.keeper.close(waits=False)

    assert (False, {}) == (busy.waits[-1], busy.keeper._untaken)
    assert "the next service will lack" not in lines.getvalue()


def test_what_there_is_no_room_for_is_an_error(kept: Kept) -> None:
    """A full keeper would drop a descriptor in silence, so one too many is an error. What the keeper already has, even
    from the former service, counts; what is forgotten makes room.
    """
    kept.keeper(room=3).keep("a", 0)
    keeper = kept.keeper(room=3)
    for name in ("b", "c", "a"):
        keeper.keep(name, 0)
    with pytest.raises(KernelError, match=r"more than 3 descriptors .*: No space left on device"):
        keeper.keep("d", 0)
    keeper.forget("b")
    keeper.keep("e", 0)
    os.close(keeper.inherited["a"])

    assert {"a", "c", "e"} == set(kept.fds)


def test_names_that_no_program_could_be_started_with_are_an_error(kept: Kept) -> None:
    """A name for which the list of all has no room is an error: no service could be started any more. Names from the
    former service count, and what is forgotten makes room.
    """
    names = [f"{number:0254}" for number in range(MAX_NAMES // 255)]
    for name in names[:10]:
        kept.keeper().keep(name, 0)
    keeper = kept.keeper()
    for name in names[10:]:
        keeper.keep(name, 0)
    with pytest.raises(KernelError, match=r"names of 513 are as long as one variable may be: No space left on device"):
        keeper.keep("x" * 254, 0)
    keeper.forget(names[0])
    keeper.keep("x" * 254, 0)
    for fd in keeper.inherited.values():
        os.close(fd)

    assert {*names[1:], "x" * 254} == set(kept.fds)


@pytest.mark.slow
def test_a_service_inherits_under_names() -> None:
    """Descriptors from number 3 on have the names that the environment gives, and no child program inherits them; of
    two with the same name only one stays open. The inheritance of another process is ignored. What is inherited takes
    its room at the keeper.
    """
    program = """
import errno, os, subprocess, sys
from xenbackend.errors import KernelError
from xenbackend.supervisor.service.keeper import Keeper, forget_inheritance
alien = Keeper({**os.environ, "LISTEN_PID": "1"}).inherited
keeper = Keeper(os.environ)
found = keeper.inherited
is_open = [os.path.exists(f"/proc/self/fd/{number}") for number in (3, 4, 5)]
forget_inheritance(os.environ)
names = [name for name in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID") if name in os.environ]
print(alien, {name: os.readlink(f"/proc/self/fd/{fd}") for name, fd in found.items()}, is_open, names)
print({name: os.get_inheritable(fd) for name, fd in found.items()})
try:
    keeper.keep("c", 0)
except KernelError as problem:
    print(problem.errno == errno.ENOSPC)
"""
    files = [os.open(place, os.O_RDONLY) for place in ("/dev/null", "/dev/zero", "/dev/full")]
    environment = {
        **os.environ, "NOTIFY_SOCKET": "/nowhere", "FDSTORE": "2", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:b",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    moves = [(os.POSIX_SPAWN_DUP2, fd, FIRST + place) for place, fd in enumerate(_moved_away(files))]
    near, far = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", program],
        environment,
        file_actions=[*moves, (os.POSIX_SPAWN_DUP2, far, 1)],
    )
    os.close(far)
    with os.fdopen(near) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    for _, fd, _ in moves:
        os.close(fd)

    assert [
        "{} {'a': '/dev/null', 'b': '/dev/zero'} [True, True, False] []", "{'a': False, 'b': False}", "True"
    ] == said.splitlines()  # fmt: skip


def _moved_away(fds: list[int]) -> list[int]:
    """Return descriptors for the same files that are out of the way."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]
    for fd in fds:
        os.close(fd)
    return moved


def test_a_keeper_costs_no_descriptor(kept: Kept) -> None:
    """Keeping and forgetting leave no descriptor open in the service."""
    keeper = kept.keeper()
    before = len(open_descriptors())
    for number in range(20):
        keeper.keep(str(number), 0)
        keeper.forget(str(number))
        assert {} == kept.fds

    assert before == len(open_descriptors())


def test_forgetting_takes_the_variables_out() -> None:
    """`forget_inheritance` removes its variables from the environment, and touches no others."""
    environment = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a", "LISTEN_PID": "1", "NOTIFY_SOCKET": "/x"}
    forget_inheritance(environment)

    assert {"NOTIFY_SOCKET": "/x"} == environment
