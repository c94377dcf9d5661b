"""The service and its workers behind their walls, as raised by a real systemd in a real dom0."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import canary
from tests.behind_walls import inspect
from tests.host.test_unit import MOST
from tests.xen.tools.command import run
from tests.xen.tools.service import UNIT, Service, attached
from xenbackend.protocol.client import DEFAULT_SOCKET, call
from xenbackend.walls.raising import Wall

SETTINGS = Path("/etc/xenbackend.toml")
PACKAGES = Path(sysconfig.get_paths()["purelib"])
PROJECT = Path(__file__).parents[2]
Restart = Callable[[str], None]


@pytest.fixture
def restart_with_canary(the_service: Service) -> Iterator[Restart]:
    """Return a function that restarts the service with given settings, and the canary as a third party's driver."""
    text = SETTINGS.read_text()
    paths, entry = PACKAGES / "canary.pth", PACKAGES / "canary-1.dist-info"

    def restart(settings: str) -> None:
        SETTINGS.write_text(settings)
        the_service.restart()

    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: canary\nVersion: 1\n")
    (entry / "entry_points.txt").write_text("[xenbackend.drivers]\ncanary = tests.canary:Canary\n")
    paths.write_text(f"{PROJECT}\n")
    yield restart
    for file in (paths, *entry.iterdir()):
        file.unlink()
    entry.rmdir()
    restart(text)


@contextmanager
def taken(the_service: Service, at: canary.Surroundings) -> Iterator[set[str]]:
    """Serve a disk of dom0 with a canary, let it try everything, and yield the attempts that succeeded."""
    with attached(0, "xvdq", "canary:", "--wait"):
        order = {"verb": "command", "vbd": "0/xvdq", "layer": "canary", "command": "escape"}
        arguments = [at.place, str(at.neighbour), str(at.page)]
        yield set(json.loads(call(DEFAULT_SOCKET, {**order, "arguments": arguments}, timeout_s=None).data))


@pytest.fixture
def at(on_tmpfs: Path) -> Iterator[canary.Surroundings]:
    """What a canary tries to reach."""
    place = on_tmpfs / "place"
    place.mkdir()
    with canary.surroundings(place) as made:
        yield made


def test_the_unit_is_exposed_little(the_service: Service) -> None:
    """The service's exposure, as measured by the systemd that runs it, is at most 4.0."""
    done = run("systemd-analyze", "security", f"--threshold={MOST}", "--no-pager", UNIT, check=False)

    assert 0 == done.status, done.out[-300:]


@pytest.mark.rows("R20")
def test_a_canary_in_a_worker_of_the_service_gets_nothing(
    restart_with_canary: Restart, at: canary.Surroundings, the_service: Service
) -> None:
    """In a worker that serves a disk, with grants and event channels, no attempt succeeds; root finds nothing amiss."""
    restart_with_canary('walls = "require"\n')
    with taken(the_service, at) as got:
        known = the_service.disk(0, "xvdq")
        amiss = inspect(known["worker"])

    by_exec = [] if Wall.PROCESSES in known["walls"] else ["the host's processes"]  # if the zygote was late
    assert (set(), by_exec) == (got, amiss)
    assert ({}, {*Wall} - {Wall.PROCESSES}) == (known["no_walls"], {*known["walls"]} - {Wall.PROCESSES})


def test_a_canary_without_walls_gets_what_the_unit_leaves(
    restart_with_canary: Restart, at: canary.Surroundings, the_service: Service
) -> None:
    """Without walls the same driver reads files, signals a neighbour, and speaks to the control socket."""
    restart_with_canary('walls = "off"\n')
    with taken(the_service, at) as got:
        pass

    assert {"read a secret", "signal a neighbour", "connect to the control socket", "fork"} <= got
