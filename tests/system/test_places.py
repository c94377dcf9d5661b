"""A place in xenstore is used again at once: for the same guest's disk, or for another guest with the same domid.

Each disk has one path, one worker and one life; nothing of a former life reaches the next, and no one waits forever.
"""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.blkif.abi import BLKIF_OP_WRITE
from xenbackend.embedded.machine import GuestDomain, Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.supervisor.vbd.phase import LINGER_S, QUIET_S
from xenbackend.supervisor.xenstore import toolstack
from xenbackend.supervisor.xenstore.paths import VbdPath

pytestmark = pytest.mark.slow
DATA = b"x" * 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image file."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    return image


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process stopped by SIGSTOP."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it may have been killed meanwhile
            os.kill(pid, signal.SIGCONT)


def users(file: Path) -> set[int]:
    """Return the processes that have a file open for I/O; a descriptor with O_PATH does not count."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.readlink() == file and not _is_only_kept(link):
                found.add(int(link.parts[2]))
    return found


def _is_only_kept(link: Path) -> bool:
    about = (link.parents[1] / "fdinfo" / link.name).read_text().splitlines()
    [flags] = [line.split()[1] for line in about if line.startswith("flags:")]
    return bool(int(flags, 8) & os.O_PATH)


def status(machine: Machine) -> dict[str, Any]:
    """Return what the service says of the only disk."""
    [found] = machine.ask({"verb": "status"})["data"]
    return found


def serve(machine: Machine, guest: GuestDomain, chain: str) -> tuple[VbdPath, Frontend]:
    """Give a guest a disk that it uses."""
    path = machine.attach(guest.domid, "xvda", chain)
    frontend = guest.connect(path, Wishes())
    frontend.write(0, DATA)
    return path, frontend


@pytest.mark.parametrize("who", ["the guest", "the toolstack", "force"])
def test_a_disk_is_closed_when_its_image_is_free(image: Path, who: str) -> None:
    """Whichever side closes first, and however slow the worker is, nobody has the image open once it is Closed."""
    seen: list[set[int]] = []

    def observe(path: str, value: bytes | None) -> None:
        if path.startswith("/local/domain/0/backend/") and path.endswith("/state") and value == b"6":
            seen.append(users(image))

    with Machine(observer=observe) as machine, closing(machine.create_guest(5)) as guest:
        path, frontend = serve(machine, guest, f"aio:{image}")
        worker = status(machine)["worker"]
        if who == "the guest":
            thread = threading.Thread(target=frontend.close)
        else:
            thread = threading.Thread(
                target=lambda: toolstack.detach(machine.store, path, 20, force=who == "force"),
            )
        with stopped(worker):
            thread.start()
            if who == "the toolstack":
                until(lambda: frontend.backend_state() == 5)
                closing_guest = threading.Thread(target=frontend.close)
                closing_guest.start()
            until(lambda: status(machine)["phase"] != "serving")
            machine.ask({"verb": "ping"})
            assert {worker} == users(image)
        thread.join(20)
        if who == "the toolstack":
            closing_guest.join(20)
        frontend.crash()

    assert [set()] == seen


@pytest.mark.parametrize("is_quiet", [True, False])
def test_a_disk_that_is_taken_away_is_flushed(image: Path, *, is_quiet: bool) -> None:
    """A guest whose disk is removed by force is answered until it was quiet for a moment, for some seconds at most.

    Its driver may have to write and flush. Closed follows before a toolstack would give up.
    """
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path, frontend = serve(machine, guest, f"aio:{image}")
        began = time.monotonic()
        ended: list[float] = []

        def detach() -> None:
            toolstack.detach(machine.store, path, force=True)
            ended.append(time.monotonic())

        thread = threading.Thread(target=detach)
        thread.start()
        until(lambda: not guest.store.directory(path.frontend))
        count = 0
        with suppress(TimeoutError):  # once the disk is closed nobody answers
            while count < 50 or not is_quiet:
                count += 1
                frontend.wait([frontend.submit(BLKIF_OP_WRITE, 8 * (count % 100), 8, DATA)], 2)
            frontend.flush()
        thread.join(20)
        took_s = ended[0] - began
        frontend.crash()

    assert count >= 50
    assert DATA == image.read_bytes()[50 * 4096 :][: len(DATA)]
    assert (took_s < QUIET_S + 3) if is_quiet else (LINGER_S <= took_s < toolstack.DETACH_TIMEOUT_S)


def test_a_place_is_attached_again_at_once(image: Path, pytestconfig: pytest.Config) -> None:
    """However soon a disk is attached again in the same place, each attach is answered and serves the guest; after the
    last detach nobody has the image open.
    """
    dice = random.Random(pytestconfig.getoption("--seed"))
    with Machine(log=image.with_name("log")) as machine, closing(machine.create_guest(5)) as guest:
        for _ in range(100 if pytestconfig.getoption("--long") else 5):
            path, frontend = serve(machine, guest, f"aio:{image}")
            assert {status(machine)["worker"]} == users(image)
            frontend.close()
            machine.detach(path)
            select.select([], [], [], dice.uniform(0, 0.05))
        until(lambda: not machine.ask({"verb": "status"})["data"])
        ping = machine.ask({"verb": "ping"})["data"]

        assert set() == users(image)
    assert (0, 0) == (ping["bugs"], ping["breaches"])
    assert "Traceback" not in image.with_name("log").read_text()


@pytest.mark.parametrize("is_killed", [False, True], ids=["busy", "killed"])
@pytest.mark.rows("C6")
def test_a_domid_that_is_used_again_at_once(tmp_path: Path, is_killed: bool) -> None:
    """C6: no order given for a dead guest's disk holds for the next guest with that domid, which gets its own chain.

    The service may have been busy, or killed, meanwhile.
    """
    with Machine(log=tmp_path / "log") as machine:
        guest = machine.create_guest(6)
        path, frontend = serve(machine, guest, "ram:1M")
        machine.ask({"verb": "pause", "vbd": "6/xvda"})
        machine.ask({"verb": "policy", "vbd": "6/xvda", "policy": "write=report,enospc=report"})
        policy = machine.ask({"verb": "policy", "vbd": "6/xvda", "policy": ""})["data"]
        service, before = machine.service_pid, status(machine)
        answers: list[dict[str, Any]] = []
        request = {"verb": "hotplug", "action": "add", "path": path.backend}
        script = threading.Thread(target=lambda: answers.append(machine.ask(request)))
        with stopped(service):
            frontend.crash()
            guest.close()
            for node in (path.backend, "/local/domain/6", "/libxl/6"):
                machine.store.remove(node)
            guest = machine.create_guest(6)
            wanted = toolstack.Attachment(path, "ram:2M")
            machine.store.transact(lambda nodes: toolstack._write_backend(nodes, wanted))
            machine.store.transact(lambda nodes: toolstack._write_frontend(nodes, wanted))
            if is_killed:
                kill(service)
                until(lambda: is_there(machine))
            script.start()
        script.join(20)
        with closing(guest):
            frontend = guest.connect(path, Wishes())
            first = frontend.read(0, 8)
            now = machine.ask({"verb": "policy", "vbd": "6/xvda", "policy": ""})["data"]
            after = status(machine)
            frontend.crash()

    assert bytes(4096) == first
    assert (True, False, "") == (before["paused"], after["paused"], after["paused_by"])
    assert ("ram:2M", 2 << 20) == (after["chain"], after["layers"][0]["size"])
    assert before["worker"] != after["worker"]
    assert policy != now
    assert ["connected"] == [each["data"] for each in answers]


def kill(pid: int) -> None:
    """Kill a process, and wait until it has ended."""
    end = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([end], [], [], 20)[0]
    os.close(end)


def is_there(machine: Machine) -> bool:
    """Return whether a service runs."""
    with suppress(XenbackendError):
        return bool(machine.service_pid)
    return False
