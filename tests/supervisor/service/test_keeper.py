"""Descriptors that outlive their service, with the keeper that `supervisor.parent` is."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import Kept
from xenbackend.errors import KernelError
from xenbackend.supervisor.service.keeper import FIRST, Keeper, forget_inheritance


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


def test_a_keeper_that_hangs_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that takes no messages holds the service up once, however much is to be kept, until it takes one again;
    all guests wait for the service.
    """
    limits: list[float | None] = []

    class Timed(socket.socket):
        def settimeout(self, value: float | None) -> None:
            limits.append(value)
            super().settimeout(value and 0.01)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as hanging:
        hanging.bind(str(tmp_path / "keep"))
        keeper = Keeper({"NOTIFY_SOCKET": str(tmp_path / "keep"), "FDSTORE": "100000"})
        monkeypatch.setattr(socket, "socket", Timed)
        fd, errors = os.memfd_create("kept"), 0
        for number in range(2000):
            try:
                keeper.keep(str(number), fd)
            except KernelError:
                errors += 1
        waits = [bool(each) for each in limits]
        while errors:
            try:
                hanging.recv(4096)
            except BlockingIOError:
                break
        keeper.keep("again", fd)
        keeper.forget("again")
        os.close(fd)

    assert errors > 1
    assert [True] * (2001 - errors) + [False] * (errors - 1) == waits
    assert [False, True] == [bool(each) for each in limits[-2:]]


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
