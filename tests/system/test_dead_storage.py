"""Storage that does not answer, as of an NFS server that has gone: one disk waits, and no other is affected.

The file system is real, and its server stops. Processes that wait for it hang in the kernel, and cannot be killed if
the server has read their request.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import fuse
from tests.until import until
from xenbackend.cli.main import main
from xenbackend.embedded.machine import GuestDomain, Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.supervisor.service import openers
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.toolstack import detach

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fuse.IS_POSSIBLE, reason="no /dev/fuse for us, so no storage that hangs"),
]
SIZE = 1 << 20
DATA = b"d" * 4096
MANY = openers.MOST + 2  # disks: more than there are openers at work at once
USUAL_S = 5.0  # ten times what it takes, as the host may be busy
MOMENTS = {"lookup": fuse.LOOKUP, "stat": fuse.GETATTR, "open": fuse.OPEN}


@contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Assert that the block takes no longer than `limit_s`."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < limit_s


class Host:
    """A machine with one guest's disk on storage that may die, and another guest's on storage that lives."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home = home
        images = dict.fromkeys(["a.img", *map(str, range(MANY))], SIZE)
        self.server = stack.enter_context(fuse.served(home / "remote", images))
        stack.callback(self.server.release)
        self.machine = stack.enter_context(Machine())
        stack.callback(self.server.release)
        self.guests = {domid: self.machine.create_guest(domid) for domid in (5, 6)}
        for guest in self.guests.values():
            stack.callback(guest.close)
        self.sound = self.attach(6, "xvda", self.image("sound.img"))
        self.frontend = self.connect(self.sound)

    def image(self, name: str) -> Path:
        """Make an image on storage that lives."""
        path = self.home / name
        path.write_bytes(bytes(SIZE))
        return path

    @property
    def remote(self) -> Path:
        """The image on the storage that may die."""
        return self.home / "remote" / "a.img"

    def attach(self, domid: int, vdev: str, image: Path) -> VbdPath:
        """Attach a disk."""
        return self.machine.attach(domid, vdev, f"aio:{image}")

    def connect(self, path: VbdPath) -> Frontend:
        """Connect a guest to it."""
        guest: GuestDomain = self.guests[path.frontend_domid]
        return guest.connect(path, Wishes())

    def status(self, disk: str = "5/xvda") -> dict[str, Any]:
        """Return what is known of a disk."""
        found = [each for each in self.machine.ask({"verb": "status"})["data"] if each["vbd"] == disk]
        return dict(found[0]) if found else {}

    def waits(self, disk: str = "5/xvda") -> bool:
        """Return whether a disk says that it waits for its storage."""
        return bool(self.status(disk).get("reason") == "storage")

    def kill(self) -> int:
        """Kill the worker of the disk, and return its number."""
        worker = int(self.status()["worker"])
        os.kill(worker, signal.SIGKILL)
        return worker

    def hanging(self) -> int:
        """Return how many processes of the service are in uninterruptible sleep."""
        found = 0
        for each in _descendants(self.machine.service_pid):
            try:
                state = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            found += state == "D"
        return found

    def see_others_served(self) -> None:
        """Assert that the second disk, a newly attached one and the service answer in their usual time."""
        with within(USUAL_S):
            self.frontend.write(0, DATA)
            assert self.frontend.read(0, 8) == DATA
        with within(USUAL_S):
            self.machine.ask({"verb": "ping"})
        with within(USUAL_S):
            other = self.attach(6, "xvdb", self.image("other.img"))
            frontend = self.connect(other)
            frontend.write(0, DATA)
        with within(USUAL_S):
            self.machine.ask({"verb": "snapshot", "vbd": "6/xvdb", "file": str(self.home / "leaf"), "format": "qcow2"})
        frontend.close()
        self.machine.detach(other)
        (self.home / "leaf").unlink()


def _descendants(pid: int) -> list[int]:
    try:
        found = [int(each) for task in Path(f"/proc/{pid}/task").iterdir()
                 for each in (task / "children").read_text().split()]  # fmt: skip
    except OSError:
        return []
    return found + [deeper for each in found for deeper in _descendants(each)]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Such a host."""
    with ExitStack() as stack:
        yield Host(tmp_path, stack)


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_disk_waits_and_no_other(host: Host, moment: str) -> None:
    """A disk whose storage hangs during the attach says so; other disks are attached, served and ordered meanwhile."""
    host.server.hold(MOMENTS[moment])
    attached: list[object] = []
    attaching = threading.Thread(target=lambda: attached.append(host.attach(5, "xvda", host.remote)))
    attaching.start()
    until(host.waits)
    found = host.status()
    host.see_others_served()
    host.server.release()
    attaching.join(20)

    assert f"{host.remote} cannot be opened: its storage does not answer" in found["error"]
    assert 1 <= found["waits_s"] < 60
    disk = host.connect(attached[0])
    disk.write(0, DATA)
    assert disk.read(0, 8) == DATA
    assert ("", None) == (host.status()["reason"], host.status()["waits_s"])
    disk.close()


def test_a_successor_waits_and_goes_on(host: Host) -> None:
    """If a worker is killed while its storage hangs, status says why the guest waits; later the guest is served."""
    path = host.attach(5, "xvda", host.remote)
    disk = host.connect(path)
    disk.write(0, DATA)
    host.server.hold(fuse.OPEN)
    host.kill()
    request = disk.submit(0, 0, 8, b"")
    until(host.waits)
    host.see_others_served()
    assert request.status is None
    host.server.release()
    disk.wait([request])

    assert DATA == request.data
    until(lambda: host.status()["reason"] == "")
    disk.close()


def output_of(words: list[str], limit_s: float) -> tuple[int, dict[str, Any]]:
    """Run a command of ours; return its exit status and all of its output. Raises: AssertionError after `limit_s`."""
    process = subprocess.Popen([sys.executable, "-m", "xenbackend", *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    said, give_up = b"", time.monotonic() + limit_s
    while select.select([process.stdout], [], [], max(0.0, give_up - time.monotonic()))[0]:
        piece = os.read(process.stdout.fileno(), 1 << 16)
        said += piece
        if not piece:
            process.stdout.close()
            return process.wait(), json.loads(said)
    process.kill()
    process.stdout.close()
    process.wait()
    raise AssertionError(f"its output has not ended: {said!r}")


@pytest.mark.parametrize("command", ["doctor", "report"])
def test_who_looks_what_is_the_matter_does_not_wait_for_it(host: Host, command: str) -> None:
    """`doctor` and `report` end in their usual time although storage hangs, children that hold their output included;
    the file of the waiting disk is unknown, and the other disk is well.
    """
    path = host.attach(5, "xvda", host.remote)
    disk = host.connect(path)
    host.server.hold(fuse.OPEN)
    host.kill()
    until(host.waits)
    words = [command, "--json", "--socket", host.machine.control]
    words += ["--output", str(host.home / "r.tar.gz")] if command == "report" else []
    status, values = output_of(words, 6 * USUAL_S)
    host.server.release()
    until(lambda: host.status()["reason"] == "")
    disk.close()

    if command == "report":
        assert (0, True) == (status, (host.home / "r.tar.gz").exists())
        return
    found = {(each["disk"], each["check"]): each for each in values["findings"]}
    assert 1 == status
    assert "wrong" == found["5/xvda", "reason"]["verdict"]
    assert "unknown" == found["5/xvda", "file"]["verdict"]
    assert f"{host.remote} did not answer within" in found["5/xvda", "file"]["sentence"]
    assert "ok" == found["6/xvda", "handshake"]["verdict"]


def test_processes_that_hang_are_few(host: Host) -> None:
    """However often the worker is killed, at most two openers of its disk and one more process hang; it recovers."""
    disk = host.connect(host.attach(5, "xvda", host.remote))
    host.server.hold(fuse.OPEN)
    most = 0
    for _ in range(6):
        if worker := host.status()["worker"]:
            with suppress(ProcessLookupError):  # it is dying, and status does not know yet
                os.kill(int(worker), signal.SIGKILL)
        until(lambda: host.waits() or "has failed to answer" in host.status()["error"])
        most = max(most, host.hanging())
    request = disk.submit(0, 0, 8, b"")
    host.server.release()
    disk.wait([request])

    assert 1 <= most <= 3
    assert request.status == 0
    until(lambda: host.hanging() == 0)
    disk.close()


def test_many_that_wait_do_not_hold_up_one_that_need_not(host: Host) -> None:
    """If more openers hang than may work at once, a disk on other storage still gets its successor soon."""
    guest = host.machine.create_guest(7)
    names = [f"7/xvd{chr(ord('a') + number)}" for number in range(MANY)]
    disks = []
    for number, name in enumerate(names):
        path = host.machine.attach(7, name.partition("/")[2], f"aio:{host.home}/remote/{number}")
        disks.append(guest.connect(path, Wishes()))
    workers = {each["vbd"]: each["worker"] for each in host.machine.ask({"verb": "status"})["data"]}
    host.server.hold(fuse.OPEN)
    for name in [*names, "6/xvda"]:
        os.kill(workers[name], signal.SIGKILL)
    with within(USUAL_S):
        host.frontend.write(0, DATA)
        assert host.frontend.read(0, 8) == DATA
    until(lambda: all(host.waits(name) for name in names))
    host.server.release()
    for each in disks:
        each.write(0, DATA)
        assert each.read(0, 8) == DATA
        each.close()
    guest.close()


@pytest.mark.parametrize("stops", [True, False], ids=["not read", "read"])
def test_a_disk_that_waits_is_detached_at_once(host: Host, stops: bool) -> None:
    """A waiting disk can be detached at once, whether its opener can be killed or not."""
    path = host.attach(5, "xvda", host.remote)
    host.connect(path)
    if stops:
        host.server.stop()
    else:
        host.server.hold(fuse.OPEN)
    host.kill()
    until(host.waits)
    with within(2 * USUAL_S):
        detach(host.machine.store, path, USUAL_S, force=True)
        until(lambda: {} == host.status())  # the service has to read xenstore for that
    host.server.go_on()


def test_the_service_ends_while_disks_wait(host: Host) -> None:
    """`stop` ends in bounded time while disks wait for their storage."""
    host.attach(5, "xvda", host.remote)
    host.server.hold(fuse.OPEN)
    host.kill()
    until(host.waits)
    with within(15):
        host.machine.stop_service()


def test_an_order_does_not_hold_up_the_guest_for_long(host: Host) -> None:
    """`set` to a chain on storage that hangs is refused; the disk stays in service."""
    host.server.hold(fuse.OPEN)
    with within(20), pytest.raises(XenbackendError, match="has not answered"):
        host.machine.ask({"verb": "set", "vbd": "6/xvda", "chain": f"aio:{host.remote}", "replace": True})
    with within(USUAL_S):
        host.frontend.write(0, DATA)
    assert "" == host.status("6/xvda")["reason"]


@pytest.mark.parametrize("moment", ["stat", "open"])
def test_a_file_that_the_server_has_lost_pauses_the_disk(host: Host, moment: str) -> None:
    """On ESTALE from the server the guest waits, the reason names the file, and `resume` tries again."""
    disk = host.connect(host.attach(5, "xvda", host.remote))
    host.server.fail(errno.ESTALE, MOMENTS[moment])
    host.kill()
    request = disk.submit(0, 0, 8, b"")
    until(lambda: host.status()["reason"] == "other-file")
    sentence = host.status()["error"]
    host.server.fail(0, MOMENTS[moment])
    host.machine.ask({"verb": "resume", "vbd": "5/xvda"})
    disk.wait([request])

    assert str(host.remote) in sentence
    assert request.status == 0
    disk.close()


@pytest.mark.parametrize("becomes", ["nothing", "a backup"])
def test_no_other_file_is_given_up_for_one_that_the_server_has_lost(host: Host, becomes: str) -> None:
    """If the server does not know a parent any more, `resume` keeps the image above it: its name is gone, or leads to a
    backup by now, and only what is kept leads to what the guest wrote.
    """
    leaf = host.home / "leaf.qcow2"
    create = ["image", "create", "qcow2", str(leaf), "--parent-format", "raw", "--parent", str(host.remote)]
    assert 0 == main(create)
    path = host.machine.attach(5, "xvda", f"qcow2:{leaf},parents={host.remote.parent}")
    backup = leaf.read_bytes()
    disk = host.connect(path)
    disk.write(64, DATA)
    leaf.unlink()
    if becomes == "a backup":
        leaf.write_bytes(backup)
    host.server.fail(errno.ESTALE, fuse.GETATTR)
    host.kill()
    until(lambda: host.status()["reason"] == "other-file", host.status)
    assert str(host.remote) in host.status()["error"]
    host.server.fail(0, fuse.GETATTR)
    host.machine.ask({"verb": "resume", "vbd": "5/xvda"})
    until(lambda: host.status()["phase"] == "serving", host.status)

    assert DATA == disk.read(64, 8)
    disk.close()
