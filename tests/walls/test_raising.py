"""What a process behind walls can reach: nothing. What it could reach if one of them were missing."""

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
    pytest.mark.xdist_group("canary"),  # the result is shared by many tests, as it takes seconds
    pytest.mark.skipif(
        os.geteuid() != 0 or platform.machine() != "x86_64",
        reason="the canary is root, and calls by numbers of x86_64",
    ),
]

# What each wall alone prevents, if the filter of system calls, which would prevent most of it too, is left out.
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
    """What the canary got, by the set of walls that were left out."""
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
    """No attempt of the canary succeeds, root finds nothing amiss, and no wall is missing."""
    assert {"got": [], "seen": [], "down": {}} == found["",]


def test_without_walls_everything_succeeds(found: Any) -> None:
    """Without walls every attempt succeeds for root; an attempt that fails anyhow would prove nothing."""
    tried = set(attempts(Surroundings("", 1, 0)))

    assert set() == tried - set(found["all",]["got"])


@pytest.mark.rows("R20", "R21", "B16")
@pytest.mark.parametrize("wall", ONLY)
def test_each_wall_stands_before_something(found: Any, wall: Wall) -> None:
    """Without one wall and the filter, the canary gets what only that wall prevents."""
    missed = _all_of(found[wall, Wall.CALLS]) - _all_of(found[Wall.CALLS,])

    assert ONLY[wall] <= missed


def test_no_dumps_of_a_process_that_stays_who_it_is(found: Any) -> None:
    """A process that changes its user cannot be dumped anyway; for one that keeps its user the wall prevents it."""
    missed = _all_of(found[Wall.USER, Wall.DUMPS, Wall.CALLS]) - _all_of(found[Wall.USER, Wall.CALLS])

    assert {"be dumped"} == missed


def test_the_filter_stands_before_what_no_other_wall_does(found: Any) -> None:
    """Without the filter the kernel offers calls that no other wall prevents."""
    offered = {"fork", "socket of netlink", "make an io_uring", "keys", "make memory executable", "namespace of users"}

    assert offered <= set(found[Wall.CALLS,]["got"])


def test_a_wall_that_cannot_be_raised_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a wall cannot be raised the others are, and the kernel's reason is reported."""
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
    """With "require" a missing wall is a sentence, with which the disk is refused."""
    _pretend(monkeypatch)
    raised = Raised()
    _walls("require").raise_all(1, raised)

    sentence = (
        'walls = "require", and this host cannot raise namespaces (make empty namespaces: Function not implemented)'
    )
    assert sentence == raised.refusal


def test_no_two_processes_have_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user is derived from the process's number, and stays below the users of systemd for any number."""
    users = _pretend(monkeypatch)
    for pid in (1, 2, 1 << 22):
        _walls("on").raise_all(pid, Raised())

    assert [FIRST_USER + 1, FIRST_USER + 2, FIRST_USER + (1 << 22)] == users
    assert max(users) < 0x7FFE0000, "from there on systemd has users of its own"


def test_what_a_driver_needs_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A need opens its own part of Landlock, and nothing else."""
    _pretend(monkeypatch)
    restricted = []
    monkeypatch.setattr(landlock, "restrict", lambda **kept: restricted.append(kept))
    for needs in ([], ["network"], ["files"]):
        _walls("on").raise_all(1, Raised(needs=needs))

    assert [(False, False), (True, False), (False, True)] == [(each["network"], each["reading"]) for each in restricted]


def test_one_reason_is_told_once() -> None:
    """Walls that are missing for the same reason are named together."""
    assert "user, limits (no); calls (never)" == describe({"user": "no", "calls": "never", "limits": "no"})


def _walls(mode: str) -> Walls:
    """Return walls on a host that has no namespaces."""
    walls = Walls("off")
    walls.mode = mode
    return walls


def _pretend(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace all walls by stubs, and return the list of users that would be set."""
    users: list[int] = []
    monkeypatch.setattr(raising, "_limit", lambda: None)
    for name in ("drop_capabilities", "refuse_new_privileges", "refuse_dumps"):
        monkeypatch.setattr(raising.privileges, name, lambda: None)
    monkeypatch.setattr(raising.privileges, "become", users.append)
    monkeypatch.setattr(landlock, "restrict", lambda **_: None)
    monkeypatch.setattr(raising.seccomp, "load", lambda _: None)
    return users
