"""Disks that xl gives to dom0 itself, and pygrub, which reads a guest's disk through one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.xen.tools import xenstore
from tests.xen.tools.command import run, until, xenbackend, xl
from tests.xen.tools.disks import blank, head, line, with_files
from tests.xen.tools.guest import GRUB_PV, Guest
from tests.xen.tools.service import Service, attached

DEVICE = Path("/dev/xvdq")
DEVID = 1 << 28 | 16 << 8  # of xvdq: from the 17th letter on numbers are extended (docs/misc/vbd-interface.txt)
BACKEND = f"/local/domain/0/backend/vbd/0/{DEVID}"
FRONTEND = f"/local/domain/0/device/vbd/{DEVID}"
CONFIGURATION = """
set timeout=0
echo GRUB reads $root
menuentry 'GRUB' {
    linux /boot/grub.bin
}
halt
"""


def states() -> tuple[str | None, str | None]:
    """Return the states of the backend and the frontend."""
    return xenstore.read(f"{BACKEND}/state"), xenstore.read(f"{FRONTEND}/state")


def test_xl_knows_what_we_attached(on_ext4: Path, the_service: Service) -> None:
    """`xenbackend attach` prints the device, which exists; xl lists the disk and detaches it."""
    image = blank(on_ext4 / "disk.raw", 16)
    told = xenbackend("attach", 0, "xvdq", f"log:|aio:{image}")
    is_there = DEVICE.is_block_device()
    listed = xl("block-list", 0).out.splitlines()[1:]
    detached = xl("block-detach", 0, "xvdq")

    assert (f"{DEVICE}\n", True) == (told.out, is_there)
    assert [[f"{DEVID}", "0", "0", "4"]] == [each.split()[:4] for each in listed]
    assert not detached.has_waited
    until("udev has taken the device away", lambda: not DEVICE.exists())


def test_we_know_what_xl_attached(on_ext4: Path, the_service: Service) -> None:
    """`xenbackend detach` detaches a disk that xl attached."""
    image = blank(on_ext4 / "disk.raw", 16)
    xl("block-attach", 0, line(f"log:|aio:{image}", "xvdq"))
    until(f"{DEVICE} is there", DEVICE.is_block_device)
    xenbackend("detach", 0, "xvdq")

    until("udev has taken the device away", lambda: not DEVICE.exists())


def test_the_driver_lets_go(on_ext4: Path, the_service: Service) -> None:
    """If dom0's driver lets go of an attached disk, it is detached at once; attached again, it has its data."""
    image = blank(on_ext4 / "disk.raw", 16)
    with attached(0, "xvdq", f"log:|aio:{image}"):
        run("dd", "if=/etc/passwd", f"of={DEVICE}", "conv=sync,fsync")
        Path("/sys/bus/xen/drivers/vbd/unbind").write_text(f"vbd-{DEVID}")
        until("both ends are closed", lambda: states() == ("6", "6"))
        without = the_service.disk(0, "xvdq")
    with attached(0, "xvdq", f"log:|aio:{image}"):
        content = head(DEVICE, 512)

    assert ("Closed", "Closed", "") == (without["state"], without["frontend_state"], without["error"])
    assert Path("/etc/passwd").read_bytes()[:512] == content


def test_pygrub(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """Pygrub, for which libxl attaches our disk to dom0, finds a kernel on it, and the guest boots from that."""
    kernel = Path(GRUB_PV).read_bytes()
    image = with_files(on_ext4 / "boot.raw", 32, {"/boot/grub/grub.cfg": CONFIGURATION, "/boot/grub.bin": kernel})
    guest = new_guest(
        disks=[line(f"log:|aio:{image}", "xvda")],
        kernel=None,
        ramdisk=None,
        memory_mib=128,
        extra='bootloader = "pygrub"\nbootloader_args = ["--quiet"]',
    )
    guest.create()
    guest.wait_for("GRUB reads")
    guest.wait_until_gone()
