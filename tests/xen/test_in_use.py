"""Images that QEMU serves to guests are refused; test_blkback.py has those of blkback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.xen.tools.command import run, until, xenbackend, xl
from tests.xen.tools.disks import blank, line
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import verify
from tests.xen.tools.service import Service

THERE = "until [ -b /dev/{} ]; do sleep 0.1; done"
QEMU = "is in use by QEMU, which serves a guest (process "


@contextmanager
def loop_over(image: Path) -> Iterator[Path]:
    """Set up a loop device for an image, while the block lasts."""
    device = run("losetup", "--find", "--show", image).out.strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@pytest.mark.parametrize("is_device", [False, True], ids=["file", "device"])
def test_a_disk_of_qemu_is_in_use(
    new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service, is_device: bool
) -> None:
    """An image that QEMU serves to a guest is refused with the reason, to xl and to `check`, until the guest has ended.

    QEMU takes no lock on it there, unlike QEMU's tools.
    """
    image = blank(on_ext4 / "theirs.raw", 16)
    with loop_over(image) as device:
        theirs = device if is_device else image
        disk = f"format=raw,backendtype=qdisk,vdev=xvda,access=rw,target={theirs}"
        guest = new_guest(disks=[disk]).create().wait_until_ready()
        guest.run(f"{THERE.format('xvda')}; {verify('/dev/xvda', '1m')}")
        refused = xl("block-attach", guest.domid, line(f"aio:{theirs}", "xvdb"), check=False)
        xl("block-detach", guest.domid, "xvdb")
        looked = xenbackend("check", "--read-only", f"aio:{theirs}", check=False)
        guest.destroy()
        until("the image is free", lambda: xenbackend("check", f"aio:{theirs}", check=False).status == 0)

    for each in (refused, looked):
        assert (True, True) == (each.status != 0, QEMU in " ".join(each.err.split())), each
    assert not refused.has_waited
