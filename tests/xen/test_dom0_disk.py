"""A disk for dom0 itself, on the kernel's own blkfront: the shortest way from a real frontend to our service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.xen.tools.command import run
from tests.xen.tools.disks import blank, check, read_file
from tests.xen.tools.service import Service, attached

DEVICE = "/dev/xvdq"


def fio(*options: str) -> None:
    """Run fio on the device: random writes with flushes in between, then verify every block."""
    run(
        *("fio", "--name=verify", f"--filename={DEVICE}", "--rw=randwrite", "--bsrange=512-256k", "--size=8m"),
        *("--ioengine=libaio", "--iodepth=16", "--direct=1", "--fsync=64", "--verify=crc32c", "--minimal", *options),
    )


@pytest.mark.parametrize("place", ["on_tmpfs", "on_ext4"])
def test_fio_reads_back_what_it_wrote(request: pytest.FixtureRequest, the_service: Service, place: str) -> None:
    """Requests of every size, 16 in flight with flushes in between, read back what was written."""
    image = blank(request.getfixturevalue(place) / "disk.raw", 64)
    with attached(0, "xvdq", f"log:|aio:{image}"):
        fio()
        fio("--offset=32m", "--randseed=2", "--blockalign=512")


def test_a_file_system_is_whole_after_detach(on_ext4: Path, the_service: Service) -> None:
    """After a detach the image has what the file system was told is durable, and e2fsck finds no fault."""
    image, mount_point = blank(on_ext4 / "disk.raw", 64), on_ext4 / "mnt"
    mount_point.mkdir()
    with attached(0, "xvdq", f"log:|aio:{image}"):
        run("mke2fs", "-q", "-t", "ext4", DEVICE)
        run("mount", DEVICE, mount_point)
        run("cp", "-r", "/etc", mount_point)
        run("umount", mount_point)

    check(image)
    assert Path("/etc/passwd").read_text() == read_file(image, "/etc/passwd")
