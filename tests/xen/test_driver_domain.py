"""A driver domain: our service in a PV guest serves another one's disks, with `xl devd` there, and plain xl in dom0."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.xen.test_kills import complaints
from tests.xen.tools.command import until, xl
from tests.xen.tools.disks import KIND
from tests.xen.tools.driver_domain import DriverDomain, driver_domain
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import Load, verify
from xenbackend.walls.raising import Wall

THERE = "until [ -b /dev/{} ]; do sleep 0.1; done"
GONE = "until ! [ -b /dev/{} ]; do sleep 0.1; done"
IMAGE, OTHER = "/img/guest.raw", "/img/other.raw"
pytestmark = pytest.mark.needs_host(0.7)  # `xl devd` waits for a disk to be offered for 10 s of real time, as xl does


def blank(storage: DriverDomain, *images: str) -> None:
    """Make sparse images of 32 MiB in the driver domain."""
    storage.run(f"mkdir -p /img && rm -f {' '.join(images)} && truncate -s 32M {' '.join(images)}")


def put(guest: Guest, vdev: str, word: str) -> None:
    """Write a word to the disk, beyond the load's area."""
    guest.run(f"{THERE.format(vdev)}; echo {word} | dd of=/dev/{vdev} bs=512 seek=60000 conv=sync,fsync 2>/dev/null")


def get(guest: Guest, vdev: str) -> str:
    """Read that word back from the disk."""
    script = f"dd if=/dev/{vdev} bs=512 skip=60000 count=1 iflag=direct 2>/dev/null | tr -d '\\0'"
    return guest.run(f"{THERE.format(vdev)}; {script}").strip()


@pytest.fixture(scope="module")
def storage() -> Iterator[DriverDomain]:
    """A driver domain that the tests share."""
    with driver_domain() as storage:
        yield storage


def test_a_guest_lives_on_its_disks(storage: DriverDomain, new_guest: Callable[..., Guest]) -> None:
    """A guest with disks from a driver domain is created, rebooted and destroyed, and gets and loses another disk.

    Nothing waits for a time-out, and nothing of the guest is left in the driver domain.
    """
    blank(storage, IMAGE, OTHER)
    disks = [storage.line(f"log:|aio:{IMAGE}", "xvda")]
    guest = new_guest(disks=disks, extra='on_reboot = "restart"').create().wait_until_ready()
    put(guest, "xvda", "kept")
    guest.run(verify("/dev/xvda"))
    listed = xl("block-list", guest.domid).out.splitlines()[-1].split()
    served = storage.disk(guest.domid, "xvda")

    xl("block-attach", guest.domid, storage.line(f"aio:{OTHER}", "xvdb"))
    guest.run(f"{THERE.format('xvdb')}; {verify('/dev/xvdb', '1m')}")
    detached = xl("block-detach", guest.domid, "xvdb")
    guest.run(GONE.format("xvdb"))
    storage.run(f"flock -n {OTHER} true")

    former = guest.domid
    xl("reboot", guest.domid)
    guest.wait_for("@ready.*@ready")
    guest.look_up()
    assert former != guest.domid
    assert "kept" == get(guest, "xvda")
    destroyed = xl("destroy", guest.domid)
    guest.wait_until_gone()

    assert ("51712", str(storage.domid), "4") == (listed[0], listed[1], listed[3])
    assert (f"{KIND}/{former}/51712", "Connected", 0) == (
        served["node"],
        served["state"],
        served["counters"]["errors"],
    )
    missing = {wall.value for wall in Wall} - {*served["walls"]}
    assert (True, {}) == (missing <= {Wall.PROCESSES.value}, served["no_walls"])  # missing if it was started by exec
    assert [(False, ""), (False, "")] == [(each.has_waited, each.err) for each in (detached, destroyed)]
    assert [] == storage.disks()


def test_its_processes_die(storage: DriverDomain, new_guest: Callable[..., Guest]) -> None:
    """Workers are killed and the service restarted in a driver domain while fio verifies, without an error.

    If the image's name comes to mean another file, the guest keeps its file, which stays locked.
    """
    blank(storage, IMAGE, OTHER)
    guest = new_guest(disks=[storage.line(f"log:|aio:{IMAGE}", "xvda")]).create().wait_until_ready()
    put(guest, "xvda", "kept")
    since, load = len(guest.log), Load(guest, "xvda")
    load.wait_until_it_writes(storage)
    for _ in range(3):
        former = storage.wait_until_served(guest, "xvda")
        storage.run(f"kill -KILL {former}")
        storage.wait_until_served(guest, "xvda", but_not_by=former)
    load.wait_until_it_writes(storage)
    storage.run("systemctl restart xenbackend")
    load.wait_until_it_writes(storage)

    storage.run(f"mv {IMAGE} {IMAGE}.moved && mv {OTHER} {IMAGE}")
    former = storage.wait_until_served(guest, "xvda")
    storage.run(f"kill -KILL {former}")
    storage.wait_until_served(guest, "xvda", but_not_by=former)
    load.wait_until_it_writes(storage)
    files = until("its files were looked at in time", lambda: looked_at(storage, guest))
    is_locked = storage.run(f"flock -n {IMAGE}.moved true || echo locked").strip()
    load.stop()

    assert "kept" == get(guest, "xvda")
    assert [] == complaints(guest, since)
    assert ([(IMAGE, "other")], "locked") == ([(each["file"], each["now"]) for each in files], is_locked)


def looked_at(storage: DriverDomain, guest: Guest) -> list[dict[str, str]]:
    """Return the files of a disk, empty if the host was too slow to examine them."""
    files: list[dict[str, str]] = storage.disk(guest.domid, "xvda")["files"]
    return files if all(each["now"] for each in files) else []


def test_a_disk_that_cannot_be(storage: DriverDomain, new_guest: Callable[..., Guest]) -> None:
    """If a driver domain cannot open a disk, xl does not learn that; the service there and xenstore have the reason.

    The guest waits, and the disk can be detached at once.
    """
    blank(storage, IMAGE)
    guest = new_guest().create().wait_until_ready()
    xl("block-attach", guest.domid, storage.line("aio:/img/missing.raw", "xvdb"))
    guest.run("sleep 1")
    is_there = guest.run("[ -b /dev/xvdb ] || echo no").strip()
    reason = storage.disk(guest.domid, "xvdb")
    shown = storage.shown(guest, "xvdb", "error")
    detached = xl("block-detach", guest.domid, "xvdb")

    assert ("no", "cannot-open", False) == (is_there, reason["reason"], detached.has_waited)
    assert "there is no file" in reason["error"]
    assert reason["error"] == shown
