"""The life of a guest with xl: disks from the start, paused, shut down, rebooted, destroyed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen.tools.command import xl
from tests.xen.tools.disks import UNSERVED, blank, check, line
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import Load
from tests.xen.tools.service import Service, attached

MANY = [f"xvd{letter}" for letter in "abcqrdefghij"]  # from the 17th letter on numbers are of another kind
FEWEST = 5  # of them, so that there are both kinds
HOTPLUG_S = 40.0  # of real time, which libxl gives all scripts of a guest together (LIBXL_HOTPLUG_TIMEOUT)


def test_pause_and_shutdown(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """A guest that is paused while it writes goes on where it was; its data outlive its shutdown."""
    image = blank(on_ext4 / "disk.raw", 32)
    other = blank(on_ext4 / "other.raw", 16)
    disks = [line(f"log:|aio:{image}", "xvda"), line(f"aio:{other}", "xvdb")]
    guest = new_guest(disks=disks, vcpus=2).create().wait_until_ready()
    guest.run("/bin/mke2fs -q -t ext4 /dev/xvda && mount -t ext4 /dev/xvda /mnt && cp /bin/busybox /mnt && umount /mnt")
    load = Load(guest, "xvdb")
    load.wait_until_it_writes(the_service)
    xl("pause", guest.domid)
    assert "Connected" == the_service.disk(guest.domid, "xvdb")["state"]
    xl("unpause", guest.domid)
    load.wait_until_it_writes(the_service)
    load.stop()
    shutdown = xl("shutdown", "-w", guest.domid)
    guest.wait_until_gone()

    assert not shutdown.has_waited
    check(image)


def test_reboot_and_destroy(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """After a reboot the new domain has the same disk; destroying it while it writes needs no time-out."""
    image = blank(on_ext4 / "disk.raw", 32)
    guest = new_guest(disks=[line(f"log:|aio:{image}", "xvda")], extra='on_reboot = "restart"')
    guest.create().wait_until_ready()
    former = guest.domid
    guest.run("echo before | dd of=/dev/xvda bs=512 seek=60000 conv=sync,fsync")
    xl("reboot", guest.domid)
    guest.wait_for("@ready.*@ready")
    guest.look_up()
    assert "before" in guest.run("dd if=/dev/xvda bs=512 skip=60000 count=1 | tr -d '\\0'")
    load = Load(guest, "xvda")
    load.wait_until_it_writes(the_service)
    destroyed = xl("destroy", guest.domid)
    guest.wait_until_gone()

    assert former != guest.domid
    assert (destroyed.has_waited, "") == (False, destroyed.err), destroyed


def names_that_fit(place: Path) -> list[str]:
    """Return the names of as many disks as scripts can attach in HOTPLUG_S on this machine, by how long one takes."""
    began = time.monotonic()
    with attached(0, "xvdz", f"log:|aio:{blank(place / 'one.raw', 1)}"):
        took_s = time.monotonic() - began
    return MANY[: max(FEWEST, int(HOTPLUG_S / took_s))]


@pytest.mark.needs_host(0.7)  # as the scripts' limit is real time
def test_twelve_disks(new_guest: Callable[..., Guest], on_tmpfs: Path, the_service: Service) -> None:
    """Twelve disks of one guest are attached in parallel, and each has the data written to it; on a slow machine there
    are as many as libxl waits for.
    """
    names = names_that_fit(on_tmpfs)
    images = {vdev: blank(on_tmpfs / f"{vdev}.raw", 1) for vdev in names}
    disks = [line(f"log:|aio:{image}", vdev) for vdev, image in images.items()]
    guest = new_guest(disks=disks).create().wait_until_ready()
    guest.run(
        f"""
        for disk in {" ".join(names)}; do
            until [ -b /dev/$disk ]; do sleep 0.1; done
            echo "this is $disk" | dd of=/dev/$disk bs=512 conv=sync,fsync || exit 1
        done
        """
    )

    assert {f"this is {vdev}" for vdev in names} == {image.read_bytes()[:12].decode() for image in images.values()}
    assert {"Connected"} == {disk["state"] for disk in the_service.disks()}


@pytest.mark.parametrize(
    ("chain", "sentence"),
    [("lgo:|aio:{}", "lgo"), ("log:|aio:{}.missing", "there is no file")],
    ids=["wrong chain", "missing image"],
)
def test_a_guest_whose_disk_cannot_be(
    new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service, chain: str, sentence: str
) -> None:
    """A guest whose disk cannot be opened is not created: xl prints our reason at once, and leaves nothing."""
    image = blank(on_ext4 / "disk.raw", 16)
    failed = new_guest(disks=[line(chain.format(image), "xvda")]).try_to_create()

    assert (True, True) == (failed.status != 0, sentence in failed.err), failed
    assert not failed.has_waited


@pytest.mark.xl_waits
@pytest.mark.parametrize("kind", UNSERVED)
def test_a_guest_without_a_service(
    new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service, kind: str
) -> None:
    """Without a service xl creates no guest; for kind `vbd` it says so at once, with the command to start one."""
    image = blank(on_ext4 / "disk.raw", 16)
    the_service.stop()
    failed = new_guest(disks=[line(f"log:|aio:{image}", "xvda", kind=kind)]).try_to_create()
    the_service.start()

    assert (True, True) == (failed.status != 0, UNSERVED[kind] in failed.err), failed
    assert not (failed.has_waited and kind == "vbd")


@pytest.mark.xl_waits
def test_destroy_without_a_service(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """Without a service xl destroys a guest after a time-out; the next service finds nothing left."""
    image = blank(on_ext4 / "disk.raw", 16)
    guest = new_guest(disks=[line(f"log:|aio:{image}", "xvda")]).create().wait_until_ready()
    guest.run("until [ -b /dev/xvda ]; do sleep 0.1; done")
    the_service.stop()
    xl("destroy", guest.domid)
    guest.wait_until_gone()
    the_service.start()

    assert [] == the_service.disks()
