"""What a process behind walls can reach: nothing; and what it could, were one of them missing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.canary import Surroundings, attempts
from xenbackend.kernel import landlock
from xenbackend.walls import raising
from xenbackend.walls.raising import FIRST_USER, Raised, Wall, Walls, describe

pytestmark = [
    pytest.mark.xdist_group("canary"),  # what it got is looked at by many tests, and takes seconds to find out
    pytest.mark.skipif(
        os.geteuid() != 0 or platform.machine() != "x86_64",
        reason="the canary is root, and calls by numbers of x86_64",
    ),
]

# What each wall alone stands before, once the filter of system calls, which would hide most of it, is left out.
ONLY = {
    Wall.DESCRIPTORS: {"have other descriptors", "standard descriptors"},
    Wall.ENVIRONMENT: {"have an environment"},
    Wall.PROCESSES: {"see a neighbour", "hold a neighbour", "the host's processes"},
    Wall.NAMESPACES: {"see the host's files", "see the network's devices", "files in its root", "namespace net"},
    Wall.LIMITS: {"limits", "have a thousand threads"},
    Wall.USER: {"become root", "another user"},
    Wall.CAPABILITIES: {"CapInh"},
    Wall.PRIVILEGES: {"NoNewPrivs"},
    Wall.LANDLOCK: {"list the root"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the canary got, by the walls that were left out."""
    place = tmp_path_factory.mktemp("canary")
    done = subprocess.run(
        [sys.executable, "-m", "tests.behind_walls", str(place)],
        cwd=Path(__file__).parents[2], check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return {tuple(key.split(",")): value for key, value in json.loads(done.stdout).items()}


def _all_of(what: Any) -> set[str]:
    return {*what["got"], *what["seen"]}


@pytest.mark.rows("R20", "R21", "B16")
def test_behind_all_walls_nothing_succeeds(found: Any) -> None:
    """The canary gets 0 of everything, nothing is amiss as root sees it, and no wall is missing."""
    assert {"got": [], "seen": [], "down": {}} == found["",]


def test_without_walls_everything_succeeds(found: Any) -> None:
    """An attempt that fails anyhow would prove nothing: without walls root gets each of them."""
    tried = set(attempts(Surroundings("", 1, 0)))

    assert set() == tried - set(found["all",]["got"])


@pytest.mark.rows("R20", "R21", "B16")
@pytest.mark.parametrize("wall", ONLY)
def test_each_wall_stands_before_something(found: Any, wall: Wall) -> None:
    """With one wall taken out the canary gets what no other wall but the filter would keep from it."""
    missed = _all_of(found[wall, Wall.CALLS]) - _all_of(found[Wall.CALLS,])

    assert ONLY[wall] <= missed


def test_no_dumps_of_a_process_that_stays_who_it_is(found: Any) -> None:
    """Who changes the user is not dumped as it is; for a service that is not root's the wall has to do it."""
    missed = _all_of(found[Wall.USER, Wall.DUMPS, Wall.CALLS]) - _all_of(found[Wall.USER, Wall.CALLS])

    assert {"be dumped"} == missed


def test_the_filter_stands_before_what_no_other_wall_does(found: Any) -> None:
    """The kernel offers more than files and processes: without the filter, each is an attack surface."""
    offered = {"fork", "socket of netlink", "make an io_uring", "keys", "make memory executable", "namespace of users"}

    assert offered <= set(found[Wall.CALLS,]["got"])


def test_a_wall_that_cannot_be_raised_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are raised all the same, and the reason is the kernel's own."""
    _pretend(monkeypatch)
    raised = Raised()
    Walls("off").raise_all(1, raised)
    assert Raised() == raised, "nothing is raised that is off"
    walls = _walls("on")
    walls.raise_all(1, raised, why_not_alone="unshare: no")

    assert {"processes": "unshare: no", "namespaces": "make empty namespaces: Function not implemented"} == raised.down
    assert [wall.value for wall in Wall][4:] == raised.up
    assert "" == raised.refusal


def test_required_walls_are_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "require" a wall that is missing is a sentence, by which the disk is refused."""
    _pretend(monkeypatch)
    raised = Raised()
    _walls("require").raise_all(1, raised)

    sentence = (
        'walls = "require", and this host cannot raise namespaces (make empty namespaces: Function not implemented)'
    )
    assert sentence == raised.refusal


def test_no_two_processes_have_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user follows from the process's number, and any number that Linux gives fits below 2^31."""
    users = _pretend(monkeypatch)
    for pid in (1, 2, 1 << 22):
        _walls("on").raise_all(pid, Raised())

    assert [FIRST_USER + 1, FIRST_USER + 2, FIRST_USER + (1 << 22)] == users
    assert max(users) < 0x7FFE0000, "from there on systemd has users of its own"


def test_what_a_driver_needs_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A need opens its own part of the filter and of Landlock, and nothing else."""
    _pretend(monkeypatch)
    restricted = []
    monkeypatch.setattr(landlock, "restrict", lambda **kept: restricted.append(kept))
    for needs in ([], ["network"], ["files"]):
        _walls("on").raise_all(1, Raised(needs=needs))

    assert [(False, False), (True, False), (False, True)] == [(each["network"], each["reading"]) for each in restricted]


def test_one_reason_is_told_once() -> None:
    """Walls that are down for one reason are named together."""
    assert "user, limits (no); calls (never)" == describe({"user": "no", "calls": "never", "limits": "no"})


def _walls(mode: str) -> Walls:
    """Return walls on a host that has no namespaces."""
    walls = Walls("off")
    walls.mode = mode
    return walls


def _pretend(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Raise nothing that would hold for this process; return the users that it would have become."""
    users: list[int] = []
    monkeypatch.setattr(raising, "_limit", lambda: None)
    for name in ("drop_capabilities", "refuse_new_privileges", "refuse_dumps"):
        monkeypatch.setattr(raising.privileges, name, lambda: None)
    monkeypatch.setattr(raising.privileges, "become", users.append)
    monkeypatch.setattr(landlock, "restrict", lambda **_: None)
    monkeypatch.setattr(raising.seccomp, "load", lambda _: None)
    return users
