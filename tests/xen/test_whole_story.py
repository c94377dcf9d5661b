"""The README's story: from blktap2's line to an image in which e2fsck finds no fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.xen.tools.command import xenbackend, xl
from tests.xen.tools.disks import blank, check
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import verify
from tests.xen.tools.service import Service

SECTOR = 512
MIB = 2048  # sectors
Ranges = list[tuple[int, int]]  # first sector, how many


def test_the_whole_story(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """A guest boots with the literal line `tap2:log:|aio:...`, makes a file system, and fio finds every block right.

    `log` reports every sector that has changed, and only sectors that were written.
    """
    image = blank(on_ext4 / "disk.raw", 64)
    guest = new_guest(disks=[f"tap2:log:|aio:{image},xvda,w"])
    guest.create(by=partial(xenbackend, "xl")).wait_until_ready()
    guest.run(
        f"""
        set -e
        /bin/mke2fs -q -t ext4 /dev/xvda 48M
        mount -t ext4 /dev/xvda /mnt
        cp /bin/busybox /mnt
        {verify("/mnt/file", "4m")}
        cmp /bin/busybox /mnt/busybox
        umount /mnt
        """,
    )
    told = _log(guest, "get")
    assert set() == _changed(image) - {sector for first, count in told for sector in range(first, first + count)}

    guest.run(
        """
        set -e
        dd if=/bin/busybox of=/dev/xvda bs=4k seek=12544 count=1 oflag=direct
        dd if=/bin/busybox of=/dev/xvda bs=64k seek=800 count=3 oflag=direct
        dd if=/bin/busybox of=/dev/xvda bs=512 seek=122881 count=1 oflag=direct
        """
    )
    written = [(49 * MIB, 8), (50 * MIB, 384), (60 * MIB, 8)]  # sectors in pieces of 4 KiB, as blktap2 had them
    assert (written, written, []) == (_log(guest, "peek"), _log(guest, "get"), _log(guest, "get"))

    xl("shutdown", "-w", guest.domid)
    guest.wait_until_gone()
    check(image)


def _log(guest: Guest, verb: str) -> Ranges:
    lines = xenbackend("log", verb, f"{guest.domid}/xvda").out.splitlines()
    return [(int(first), int(count)) for first, count in map(str.split, lines)]


def _changed(image: Path) -> set[int]:
    """Return the sectors with data of an image that was blank before."""
    content, nothing = image.read_bytes(), bytes(SECTOR)
    return {at // SECTOR for at in range(0, len(content), SECTOR) if content[at : at + SECTOR] != nothing}
