"""A worker that was taken over: a driver in its chain tries everything to break out, and gets nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import canary
from tests.behind_walls import inspect
from tests.openers import Openers
from tests.stamp import stamp
from xenbackend import journal
from xenbackend.kernel import memfd
from xenbackend.protocol import codec, jobs, messages
from xenbackend.protocol.codes import Code

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or os.uname().machine != "x86_64" or shutil.which("unshare") is None,
        reason="the canary is root in a mount namespace of its own, and calls by numbers of x86_64",
    ),
]
ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "build" / "canary.json"
HOST = "xenbackend.rig.host"
_ENTRY_POINTS = "[xenbackend.drivers]\n" + "".join(
    f"{each.name} = tests.canary:{each.__name__}\n" for each in (canary.Canary, canary.OfNetwork, canary.OfFiles)
)


class Taken:
    """A worker whose chain is a canary."""

    def __init__(self, near: socket.socket, pid: int) -> None:
        self._near = near
        self.pid = pid

    def open(self, chain: str) -> messages.Standing:
        """Send Open with the chain, and return the standing."""
        memory = memfd.make("journal", journal.SIZE)
        order = messages.Open(1, "vbd/5/51712", HOST, 5, chain, read_only=False)
        openers = Openers()
        with openers.begin(jobs.Job(order.vbd, [chain], read_only=False)) as opener:
            socket.send_fds(self._near, [codec.encode(order)], [memory, opener.fileno()])
        os.close(memory)
        while True:
            said = codec.from_worker(self._near.recv(messages.MAX_MESSAGE))
            if isinstance(said, messages.Standing) and (said.layers or said.failure):
                openers.close()
                return said

    def escape(self, at: canary.Surroundings) -> set[str]:
        """Return the names of the attempts that succeeded."""
        command = messages.Command("0", "escape", [at.place, str(at.neighbour), str(at.page)])
        self._near.send(codec.encode(messages.Ask(1, command)))
        while True:
            said = codec.from_worker(self._near.recv(messages.MAX_MESSAGE))
            if isinstance(said, messages.Reply):
                assert said.code is Code.OK, said
                return set(json.loads(said.data))


SELDOM_OFFERED = {"read a neighbour's memory"}  # Debian 12's dom0 in the bed does not


@contextmanager
def taken(place: Path, walls: str, word: str) -> Iterator[Taken]:
    """Start a worker in a mount namespace of its own, in which the canaries are installed as third parties' drivers."""
    package = place / "packages" / "canaries-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: canaries\nVersion: 1\n")
    (package / "entry_points.txt").write_text(_ENTRY_POINTS)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(120)
    command = [
        "unshare", "--mount", "--propagation", "private", sys.executable, "-m", "xenbackend.worker.main",
        "--host", HOST, "--walls", walls, "--drivers", word, "--socket", str(far.fileno()),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(package.parent)])
    process = subprocess.Popen(command, pass_fds=[far.fileno()], env={**os.environ, "PYTHONPATH": path})
    far.close()
    try:
        with near:
            yield Taken(near, process.pid)
        assert 0 == process.wait(20)
    finally:
        process.kill()
        process.wait()


def what_root_may(place: Path) -> set[str]:
    """Return the attempts that succeed for a program of root's in its own mount namespace, as a measure of this host.

    Dom0 may have no network card, or a kernel that lacks something.
    """
    place.mkdir()
    with canary.surroundings(place) as at:
        program = f"import json; from tests import canary; print(json.dumps(canary.try_all(canary.{at!r})))"
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120)
    return set(json.loads(done.stdout)) - {"have other descriptors"}


@pytest.fixture
def at(tmp_path: Path) -> Iterator[canary.Surroundings]:
    """What a canary tries to reach."""
    place = tmp_path / "place"
    place.mkdir()
    with canary.surroundings(place) as made:
        yield made


@pytest.mark.rows("R20")
def test_a_canary_gets_nothing(tmp_path: Path, at: canary.Surroundings) -> None:
    """No attempt of a canary in a worker behind its walls succeeds, and root finds nothing amiss.

    The count is left for the scoreboard.
    """
    with taken(tmp_path, "on", "canary") as worker:
        standing = worker.open("canary:")
        got = worker.escape(at)
        amiss = inspect(worker.pid)
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(json.dumps({"succeeded": len(got), **stamp()}))

    assert ("", []) == (standing.failure, standing.needs)
    assert set() == got
    assert ["the host's processes"] == amiss, "which only a worker of the zygote's is kept from"


def test_a_canary_without_walls_gets_everything(tmp_path: Path, at: canary.Surroundings) -> None:
    """Without walls the same driver's attempts succeed, as far as this host allows them to root."""
    with taken(tmp_path, "off", "canary") as worker:
        worker.open("canary:")
        got = worker.escape(at)
    offered = what_root_may(tmp_path / "root")
    every = canary.attempts(at).keys() - {"have other descriptors"}

    assert offered == got
    assert every - offered <= SELDOM_OFFERED


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("canary-of-network", {"socket of IPv4", "send a descriptor"}),
        ("canary-of-files", {"list the root", "see the host's files"}),
    ],
)
def test_what_a_driver_needs_it_gets_and_no_more(
    tmp_path: Path, at: canary.Surroundings, word: str, expected: set[str]
) -> None:
    """A third party's driver gets what it declares as a need and nothing more, and the standing names the need."""
    with taken(tmp_path, "on", word) as worker:
        standing = worker.open(f"{word}:")
        got = worker.escape(at)

    assert [word.removeprefix("canary-of-")] == standing.needs
    assert expected == got


def test_a_chain_cannot_bring_a_driver_in_later(tmp_path: Path) -> None:
    """A worker behind its walls imports no third party's driver, whose code would run as root while imported."""
    with taken(tmp_path, "on", "") as worker:
        standing = worker.open("canary:")

    assert "this disk's worker was started without it" in standing.failure
