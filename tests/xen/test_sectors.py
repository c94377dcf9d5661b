"""Disks whose sectors are not of 512 bytes ("4Kn") in Linux; test_grub.py has one for GRUB."""

from __future__ import annotations

import pytest

from tests.xen.tools.command import xl
from tests.xen.tools.disks import check, line, memory_disk, read_file
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import verify
from tests.xen.tools.service import Service

THERE = "until [ -b /dev/xvdb ]; do sleep 0.1; done"
GONE = "until ! [ -b /dev/xvdb ]; do sleep 0.1; done"
FILE_SYSTEM_MIB = 32  # on 1 GiB
MEDIA = {  # the medium's sectors, a word for the layer, the guest's logical and physical sectors
    "4Kn": (4096, "", 4096, 4096),
    "4Kn as 512": (4096, ",sector=512", 512, 4096),
    "512 as 4096": (512, ",sector=4096", 4096, 4096),
}


@pytest.mark.parametrize("medium", MEDIA)
def test_linux(linux: Guest, the_service: Service, medium: str) -> None:
    """Linux sees the right sector sizes and the whole disk, and fio verifies requests of every number of sectors.

    A file system made there is sound for a reader of the medium itself.
    """
    sector_size, word, logical, physical = MEDIA[medium]
    with memory_disk(sector_size=sector_size) as disk:
        xl("block-attach", linux.domid, line(f"log:|aio:{disk}{word}", "xvdb"))
        queue = "/sys/block/xvdb/queue"
        seen = linux.run(
            f"{THERE}; cat {queue}/logical_block_size {queue}/physical_block_size; blockdev --getsize64 /dev/xvdb"
        )
        linux.run(verify("/dev/xvdb", "4m", sector_size=logical))
        linux.run(
            f"""
            set -e
            /bin/mke2fs -q -t ext4 /dev/xvdb {FILE_SYSTEM_MIB}M
            mount -t ext4 /dev/xvdb /mnt
            echo kept >/mnt/file
            umount /mnt
            """
        )
        counters = the_service.disk(linux.domid, "xvdb")["counters"]
        xl("block-detach", linux.domid, "xvdb")
        linux.run(GONE)
        check(disk)
        file = read_file(disk, "/file")

    assert [logical, physical, 1 << 30] == [int(each) for each in seen.split()]
    assert ("kept\n", 0) == (file, counters["errors"])
