"""A newer service takes over from the last release: guests under load notice nothing, whatever is killed meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.former_release import PATIENCE_S, ROOT, Site, ask, unpack, wait_for_end
from tests.until import until
from tests.workload import Load, make_model, read_all
from xenbackend.block.spec import parse_chain
from xenbackend.embedded.machine import Machine
from xenbackend.image.facts import chain_facts
from xenbackend.image.names import find_image
from xenbackend.image.trust import trust
from xenbackend.rig.frontend import Wishes
from xenbackend.supervisor.xenstore.toolstack import vbd_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]
SECTORS = 4096
NEXT = ("xenbackend/protocol/messages.py", "\nVERSION = 6\n", "\nVERSION = 7\n")  # how a later release may differ


@pytest.fixture(scope="session")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last release's program."""
    return unpack(tmp_path_factory.mktemp("former"))


class Host:
    """A machine that starts with a service of the last release, with a disk under load."""

    def __init__(self, machine: Machine, site: Site, image: Path, seed: int, driver: str = "aio") -> None:
        """Give guest 5 the disk, and connect it."""
        self.machine = machine
        self.site = site
        self.guest = machine.create_guest(5)
        store = str(machine.directory / "xenstore.sock")
        site.run("attach", "--store", store, "--socket", machine.control, "5", "xvda", f"log:|{driver}:{image}")
        path = vbd_path(machine.store, 5, "xvda")
        self.frontend = self.guest.connect(path, Wishes(queues=2, persistent=True, indirect=32))
        self.model = make_model(seed, SECTORS)
        self.load = Load(self.frontend, self.model, patience_s=PATIENCE_S)
        self.load.run(300)

    def status(self) -> dict[str, Any]:
        """Return what the service says of the disk, or an empty dict if it does not know the disk yet."""
        return (ask(self.machine.control, {"verb": "status"}) or [{}])[0]

    def service(self) -> int:
        """Return the service's process."""
        # One service ends and another starts; until then the question is repeated.
        found = until(lambda: ask(self.machine.control, {"verb": "ping"}), "there is no service")
        return int(found["pid"])

    def replace(self, program: Path = ROOT) -> None:
        """Install a program, and have its service take the place of the running one."""
        pidfd = os.pidfd_open(self.service())
        self.site.install(program)
        self.load.top_up()
        self.machine.replace_service()
        wait_for_end(pidfd)
        os.close(pidfd)

    def upgrade(self, program: Path = ROOT) -> None:
        """Replace the program, and keep the rings full until another worker serves the disk."""
        worker = self.status()["worker"]
        self.replace(program)
        self.work_until(lambda: self.status().get("worker") not in (None, worker))

    def work_until(self, condition: Callable[[], object]) -> None:
        """Keep the rings full until a condition holds; the condition may wait for a service."""
        is_over, end = Event(), time.monotonic() + PATIENCE_S
        held: list[object] = []

        def wait() -> None:
            while not is_over.is_set() and time.monotonic() < end and not held:
                held.extend([found] if (found := condition()) else [])
            is_over.set()

        thread = Thread(target=wait)
        thread.start()
        try:
            while not is_over.is_set():
                self.load.run(10)
        finally:
            is_over.set()
            thread.join()
        assert held, "it never happened"

    def finish(self) -> None:
        """Run the load a little longer, then check that nothing failed and every sector is right."""
        self.load.run(1000)
        self.load.finish()
        assert 0 == self.model.failures
        read_all(self.frontend, self.model)


@pytest.fixture
def host(
    former: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Host]:
    """A host with the last release."""
    site = Site(tmp_path / "site", former)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SECTORS * 512)
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    with Machine(log=tmp_path / "log") as machine:
        host = Host(machine, site, image, request.config.getoption("--seed"))
        with closing(host.guest):
            yield host
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_service_is_replaced_under_load(host: Host) -> None:
    """Under load the disk gets another worker, by its journal: no request fails or is lost; the counters continue."""
    host.work_until(lambda: host.status()["counters"]["writes"])  # a worker reports once a second
    before = host.status()
    host.upgrade()
    host.finish()
    after = host.status()

    assert before["worker"] != after["worker"]
    assert before["counters"]["writes"] <= after["counters"]["writes"]
    assert ("serving", before["chain"]) == (after["phase"], after["chain"])
    assert host.machine.written_ranges("5/xvda")  # the former worker's dirty map was kept


def test_the_worker_is_killed_meanwhile(host: Host) -> None:
    """If the worker is killed just before the service is replaced, its journal is enough for the new service."""
    worker = host.status()["worker"]
    host.load.top_up()
    os.kill(worker, signal.SIGKILL)
    host.replace()
    host.work_until(lambda: host.status().get("worker") not in (None, worker))
    host.finish()


def test_new_services_are_killed_meanwhile(host: Host) -> None:
    """However often a new service is killed while it takes over, the next one can continue."""
    former = host.service()
    host.replace()
    for _ in range(4):
        service = host.service()
        assert former != service
        pidfd = os.pidfd_open(service)
        host.load.top_up()
        os.kill(service, signal.SIGKILL)
        wait_for_end(pidfd)
        os.close(pidfd)
        host.load.run(50)
    host.finish()


def test_what_an_administrator_had_ordered_holds(host: Host) -> None:
    """A pause and a policy given to the last release hold in this one; the guest's requests wait until `resume`."""
    assert ask(host.machine.control, {"verb": "policy", "vbd": "5/xvda", "policy": "write=report"})
    host.load.finish()
    assert ask(host.machine.control, {"verb": "pause", "vbd": "5/xvda"})
    host.load.top_up()
    host.replace()
    until(lambda: host.status().get("phase") == "serving")
    with pytest.raises(TimeoutError):  # requests made since then wait
        host.frontend.wait_for_any(0.2)
    assert "write=report" in str(ask(host.machine.control, {"verb": "policy", "vbd": "5/xvda", "policy": ""}))
    assert ask(host.machine.control, {"verb": "resume", "vbd": "5/xvda"})
    host.finish()


def test_an_older_service_leaves_a_newer_one_s_disks_alone(host: Host, tmp_path: Path) -> None:
    """An older service refuses to start and says why; the guest is served until the newer service takes over again."""
    later = tmp_path / "later"
    shutil.copytree(ROOT / "xenbackend", later / "xenbackend", ignore=shutil.ignore_patterns("__pycache__"))
    changed = later / NEXT[0]
    text = changed.read_text()
    assert 1 == text.count(NEXT[1])
    changed.write_text(text.replace(*NEXT[1:]))
    host.upgrade()
    host.upgrade(later)
    worker = host.status()["worker"]
    host.replace(ROOT)  # from here on only the worker runs
    host.work_until(lambda: "is served by a newer version of xenbackend" in host.machine.log.read_text())
    host.load.run(300)
    host.site.install(later)
    host.service()
    host.finish()

    assert worker == host.status()["worker"]


def test_a_disk_with_parents_goes_on(
    former: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A disk with parents that the last release has open stays allowed; its images are marked, so that it starts again.

    Images of that release that were not open are refused until they are trusted.
    """
    site = Site(tmp_path / "site", former)
    image = tmp_path / "base"
    with image.open("wb") as file:
        file.truncate(SECTORS * 512)
    site.run("image", "create", "qcow2", str(tmp_path / "mid"), "--parent", str(image), "--parent-format", "raw")
    for name in ("image", "idle"):
        site.run("image", "snapshot", f"qcow2:{tmp_path}/mid", str(tmp_path / name))
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    with Machine(log=tmp_path / "log") as machine:
        seed = request.config.getoption("--seed")
        host = Host(machine, site, tmp_path / "image", seed, driver="qcow2")
        with closing(host.guest):
            host.upgrade()
            host.finish()
        assert "Traceback" not in (tmp_path / "log").read_text()

    chain = chain_facts(parse_chain(f"qcow2:{tmp_path}/image"))
    assert ["its mark", "its mark", ""] == [each.parent_by for each in chain.layers]
    idle = chain_facts(parse_chain(f"qcow2:{tmp_path}/idle"))
    assert "is named only by the image" in idle.problem
    trust(find_image(f"qcow2:{tmp_path}/idle"))
    assert 3 == len(chain_facts(parse_chain(f"qcow2:{tmp_path}/idle")).layers)
