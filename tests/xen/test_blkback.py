"""Our disks beside the kernel's own block backend: absent, loaded, and loaded late.

They are of its kind `vbd` here, which every Xen has; from 4.19 on there is a kind that it ignores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.xen.tools import xenstore
from tests.xen.tools.command import run, until, xenbackend, xl
from tests.xen.tools.disks import backend, blank, line
from tests.xen.tools.guest import Guest, unbind
from tests.xen.tools.load import Load, verify
from tests.xen.tools.service import Service

BLACKLIST = Path("/etc/modprobe.d/no-blkback.conf")
DRIVER = Path("/sys/bus/xen-backend/drivers/vbd")
VDEVS = {"xvda": 51712, "xvdb": 51728}
OF_STOCK_SCRIPT = {"node", "physical-device", "physical-device-path"}  # what /etc/xen/scripts/block writes for blkback
BOTH_THERE = "for disk in xvda xvdb; do until [ -b /dev/$disk ]; do sleep 0.1; done; done"


@pytest.fixture
def no_blkback() -> Iterator[None]:
    """Xen-blkback is not loaded, and udev may not load it."""
    BLACKLIST.write_text("blacklist xen-blkback\n")
    run("udevadm", "control", "--reload")
    run("modprobe", "-r", "xen-blkback")
    yield
    BLACKLIST.unlink()
    run("udevadm", "control", "--reload")


def served_by_blkback(guest: Guest) -> list[str]:
    """Return the names of the devices that the kernel serves."""
    return [each.name.split("-")[-1] for each in DRIVER.glob(f"vbd-{guest.domid}-*")]


def test_blkback_comes_late(
    no_blkback: None, new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service
) -> None:
    """A disk of ours works without xen-blkback, and stays ours if that is loaded while the guest writes."""
    ours, theirs = blank(on_ext4 / "ours.raw", 32), blank(on_ext4 / "theirs.raw", 32)
    guest = new_guest(disks=[line(f"log:|aio:{ours}", "xvda", kind="vbd")], vcpus=2).create().wait_until_ready()
    assert not DRIVER.exists()
    load = Load(guest, "xvda")
    load.wait_until_it_writes(the_service)
    run("modprobe", "xen-blkback")
    xl("block-attach", guest.domid, f"file:{theirs},xvdb,w")
    guest.run("until [ -b /dev/xvdb ]; do sleep 0.1; done; " + verify("/dev/xvdb"))
    load.wait_until_it_writes(the_service)
    load.stop()

    assert ["51728"] == served_by_blkback(guest)
    assert ["xvda"] == [disk["device"] for disk in the_service.disks()]


def test_a_disk_of_blkback_is_in_use(new_guest: Callable[..., Guest], on_ext4: Path) -> None:
    """An image that blkback serves to a guest is refused, as file or loop device, until the guest has ended."""
    run("modprobe", "xen-blkback")
    theirs = blank(on_ext4 / "theirs.raw", 16)
    guest = new_guest(disks=[f"file:{theirs},xvda,w"]).create().wait_until_ready()
    number = xenstore.read(f"{backend(guest.domid, 51712, kind='vbd')}/physical-device")
    assert number is not None
    device = f"/dev/loop{int(number.split(':')[1], 16)}"
    for path in (theirs, device):
        for words in (["check"], ["check", "--read-only"]):
            refused = xenbackend(*words, f"aio:{path}", check=False)
            assert f"the kernel's backend for the disk {guest.domid}/xvda" in refused.err, (path, words)
    guest.destroy()
    until("the image is free", lambda: xenbackend("check", f"aio:{theirs}", check=False).status == 0)


def keys(guest: Guest, devid: int) -> list[str]:
    """Return the names of a backend's nodes."""
    return [path.split("/")[-1] for path in xenstore.tree(backend(guest.domid, devid, kind="vbd"))]


def states(guest: Guest) -> dict[str, tuple[str | None, str | None]]:
    """Return the states of both ends of each disk."""
    return {
        vdev: (
            xenstore.read(f"{backend(guest.domid, devid, kind='vbd')}/state"),
            xenstore.read(f"/local/domain/{guest.domid}/device/vbd/{devid}/state"),
        )
        for vdev, devid in VDEVS.items()
    }


def test_beside_a_disk_of_blkback(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """Our disk offers the keys of blkback's, goes through the same states, and holds the same data.

    That holds while it is used and after the guest's driver has let go of it.
    """
    run("modprobe", "xen-blkback")
    ours, theirs = blank(on_ext4 / "ours.raw", 16), blank(on_ext4 / "theirs.raw", 16)
    disks = [line(f"log:|aio:{ours}", "xvda", kind="vbd"), f"file:{theirs},xvdb,w"]
    guest = new_guest(disks=disks, vcpus=2).create().wait_until_ready()
    guest.run(BOTH_THERE)
    offered = [set(keys(guest, devid)) for devid in VDEVS.values()]
    assert offered[0] == offered[1] - OF_STOCK_SCRIPT
    guest.run("dd if=/bin/busybox of=/dev/xvda bs=64k conv=fsync && dd if=/dev/xvda of=/dev/xvdb bs=64k conv=fsync")

    assert {("4", "4")} == set(states(guest).values())
    assert ["51728"] == served_by_blkback(guest)
    for devid in VDEVS.values():
        guest.run(unbind(devid))
    until("both ends of both disks are closed", lambda: {("6", "6")} == set(states(guest).values()))

    assert ours.read_bytes() == theirs.read_bytes() != bytes(16 << 20)
