"""A Linux PV guest with disks of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.xen.tools.command import until, xenbackend
from tests.xen.tools.disks import blank, check
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import verify
from tests.xen.tools.service import Service, attached


def write_and_verify(vdev: str) -> str:
    """Return a script for a guest that has just got a disk."""
    return f"until [ -b /dev/{vdev} ]; do sleep 0.1; done\n{verify(f'/dev/{vdev}')}"


def test_a_disk_from_the_first_moment(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """A guest that boots with our disk makes a file system on it, which is sound after the guest has shut down."""
    image = blank(on_ext4 / "disk.raw", 64)
    guest = new_guest().create(paused=True)
    xenbackend("attach", guest.domid, "xvda", f"log:|aio:{image}")
    guest.unpause().wait_until_ready()
    guest.run(
        """
        set -e
        mke2fs -q -t ext4 /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        cp /bin/busybox /mnt
        umount /mnt
        e2fsck -f -n /dev/xvda
        """
    )
    guest.start("poweroff -f")
    guest.wait_until_gone()

    check(image)


def test_attach_and_detach_while_it_runs(linux: Guest, on_tmpfs: Path, the_service: Service) -> None:
    """A running guest gets a disk, fio verifies every block of it, and the disk is detached."""
    image = blank(on_tmpfs / "disk.raw", 64)
    with attached(linux.domid, "xvdb", f"log:|aio:{image}"):
        linux.run(write_and_verify("xvdb"))
        until("its writes are counted", lambda: count(the_service, linux, "writes") > 0)
        errors = count(the_service, linux, "errors")

    assert 0 == errors
    until("the guest has let go", lambda: "gone" in linux.run("[ -b /dev/xvdb ] || echo gone"))


def count(service: Service, guest: Guest, name: str) -> int:
    """Return a counter of a guest's xvdb, which workers sum up once a second."""
    return int(service.disk(guest.domid, "xvdb")["counters"][name])


def test_two_disks_at_once(linux: Guest, on_tmpfs: Path, on_ext4: Path, the_service: Service) -> None:
    """Two disks under load at the same time each hold their own data."""
    one, two = blank(on_tmpfs / "one.raw", 32), blank(on_ext4 / "two.raw", 32)
    with attached(linux.domid, "xvdb", f"aio:{one}"), attached(linux.domid, "xvdc", f"aio:{two}"):
        jobs = [linux.start(write_and_verify(device)) for device in ("xvdb", "xvdc")]
        for job in jobs:
            job.wait()
