"""GRUB as a guest: a second frontend, unrelated to Linux's.

It has one ring and no persistent grants; the one for PVH uses the 32-bit layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen.tools import xenstore
from tests.xen.tools.disks import check, line, read_file, with_files
from tests.xen.tools.guest import GRUB_PV, GRUB_PVH_32, Guest
from tests.xen.tools.service import Service

CONTENT = bytes(range(256)) * 16 * 97  # 388 KiB, so that many requests are needed
CONFIGURATION = """
echo BEGIN
sha256sum /content
set word=written
save_env --file /boot/grub/grubenv word
echo END
halt
"""
EMPTY_ENVIRONMENT = "# GRUB Environment Block\n".ljust(1024, "#")


@pytest.mark.parametrize(
    ("kind", "kernel", "protocol", "sector_size"),
    [("pv", GRUB_PV, "x86_64-abi", 512), ("pvh", GRUB_PVH_32, "x86_32-abi", 512), ("pv", GRUB_PV, "x86_64-abi", 4096)],
    ids=["pv", "pvh", "4Kn"],
)
def test_grub_reads_and_writes(
    new_guest: Callable[..., Guest],
    on_ext4: Path,
    the_service: Service,
    kind: str,
    kernel: str,
    protocol: str,
    sector_size: int,
) -> None:
    """GRUB finds its configuration on our disk, reads a file correctly, and writes a block that e2fsck accepts."""
    image = with_files(
        on_ext4 / "boot.raw",
        16,
        {"/boot/grub/grub.cfg": CONFIGURATION, "/boot/grub/grubenv": EMPTY_ENVIRONMENT, "/content": CONTENT},
        block_size=max(1024, sector_size),
    )
    disks = [line(f"log:|aio:{image},sector={sector_size}", "xvda")]
    guest = new_guest(kind=kind, kernel=kernel, ramdisk=None, disks=disks, memory_mib=128).create()
    guest.wait_for("BEGIN")
    seen = xenstore.read(f"/local/domain/{guest.domid}/device/vbd/51712/protocol")
    guest.wait_for("END")
    guest.wait_until_gone()

    assert protocol == (seen or "x86_64-abi")
    assert hashlib.sha256(CONTENT).hexdigest() in guest.log
    check(image)
    assert "word=written" in read_file(image, "/boot/grub/grubenv")
