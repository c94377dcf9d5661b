"""CD drives of HVM guests: QEMU serves them beside disks of ours, and xl refuses to let us serve them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen.test_hvm import bootable, wait_for_marker
from tests.xen.tools import xenstore
from tests.xen.tools.command import until, xl
from tests.xen.tools.disks import KIND, blank, line
from tests.xen.tools.guest import Guest
from tests.xen.tools.service import Service

DRIVE = "devtype=cdrom,access=ro,vdev=hdc,target={}"
REFUSED = {  # kind -> the words before the drive, and xl's error; `vbd3` only if this xl knows it
    "vbd": ("script=block-xenbackend", "no suitable backend for disk hdc"),
    "vbd3": ("backendtype=tap,script=block-xenbackend", "Backend for CD devices on HVM guests must be Qdisk"),
}


def with_a_cd(new_guest: Callable[..., Guest], image: Path, serial: Path, drive: str) -> Guest:
    """Return an HVM guest that boots from our disk and has a CD drive."""
    return new_guest(
        kind="hvm",
        kernel=None,
        ramdisk=None,
        memory_mib=64,
        disks=[line(f"log:|aio:{image}", "hda"), drive],
        extra=f'serial = "file:{serial}"\nvnc = 0',
    )


def test_a_medium_is_changed(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """`xl cd-eject` and `cd-insert` change the medium in QEMU's drive while the guest goes on with our disk.

    They refuse our disk, which is not a drive, and a chain, which is not a medium.
    """
    image, serial = bootable(on_ext4 / "boot.raw"), on_ext4 / "serial.txt"
    one, two = blank(on_ext4 / "one.iso", 1), blank(on_ext4 / "two.iso", 2)
    guest = with_a_cd(new_guest, image, serial, f"format=raw,{DRIVE.format(one)}").create()
    wait_for_marker(serial)
    before, node = the_service.disk(guest.domid, "hda"), f"/local/domain/0/backend/qdisk/{guest.domid}/5632/params"
    media = [xenstore.read(node)]
    for words in (["cd-eject", guest.domid, "hdc"], ["cd-insert", guest.domid, "hdc", two]):
        xl(*words)
        media.append(xenstore.read(node))
    refused = [
        xl("cd-insert", guest.domid, "hdc", f"aio:{one}", check=False),
        xl("cd-eject", guest.domid, "hda", check=False),
    ]
    printed = serial.stat().st_size
    until("the guest goes on", lambda: serial.stat().st_size > printed)
    after = the_service.disk(guest.domid, "hda")

    assert [f"aio:{one}", "", f"aio:{two}"] == media
    assert [True, True] == [each.status != 0 for each in refused]
    assert ("Cannot stat file" in refused[0].err, "device not found" in refused[1].err) == (True, True), refused
    kept = ("worker", "state", "error", "chain")
    assert [before[key] for key in kept] == [after[key] for key in kept]


@pytest.mark.parametrize("kind", [each for each in REFUSED if each in ("vbd", KIND)])
def test_a_drive_of_ours_is_refused(
    new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service, kind: str
) -> None:
    """A CD drive of ours is refused by xl at once, and no guest is created."""
    words, sentence = REFUSED[kind]
    image, medium = bootable(on_ext4 / "boot.raw"), blank(on_ext4 / "one.iso", 1)
    drive = f"{words},{DRIVE.format(f'aio:{medium}')}"
    failed = with_a_cd(new_guest, image, on_ext4 / "serial.txt", drive).try_to_create()

    assert (True, True) == (failed.status != 0, sentence in failed.err), failed
    assert not failed.has_waited
