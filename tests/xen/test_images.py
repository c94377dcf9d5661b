"""Images with parents as the disks of a running guest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from tests.xen.tools.command import xenbackend, xl
from tests.xen.tools.disks import check, line, read_file, with_files
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import verify
from tests.xen.tools.service import Service

FORMATS = ("vhd", "qcow2")
KEPT = "in the parent\n"


def family(place: Path, raw: Path, format_: str) -> list[Path]:
    """Make an image with the contents of `raw`, and return two leaves of it, made in two ways."""
    parent, one, two = (place / f"{name}.{format_}" for name in ("parent", "one", "two"))
    xenbackend("image", "convert", "--quiet", f"aio:{raw}", f"{format_}:{parent}")
    xenbackend("image", "snapshot", f"{format_}:{parent}", one)
    xenbackend("image", "create", format_, two, "--parent", parent, "--parent-format", format_)
    return [one, two]


def digests(place: Path) -> list[str]:
    """Return digests of the parents."""
    return [hashlib.sha256((place / f"parent.{each}").read_bytes()).hexdigest() for each in FORMATS]


def test_leaves_share_a_parent(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """Two leaves of one parent are written at the same time: fio finds every block right, the parents are unchanged,
    and every image and file system is sound.
    """
    raw = with_files(on_ext4 / "parent.raw", 32, {"/kept": KEPT})
    leaves = [leaf for format_ in FORMATS for leaf in family(on_ext4, raw, format_)]
    disks = {f"xvd{letter}": leaf for letter, leaf in zip("abcd", leaves, strict=True)}
    chains = {vdev: f"log:|{leaf.suffix[1:]}:{leaf}" for vdev, leaf in disks.items()}
    before = digests(on_ext4)
    guest = new_guest(disks=[line(chain, vdev) for vdev, chain in chains.items()], vcpus=2)
    guest.create().wait_until_ready()
    jobs = [guest.start(write_into(vdev)) for vdev in disks]
    for job in jobs:
        job.wait()
    errors = [disk["counters"]["errors"] for disk in the_service.disks()]
    xl("shutdown", "-w", guest.domid)
    guest.wait_until_gone()

    assert ([0] * 4, before) == (errors, digests(on_ext4))
    for vdev, leaf in disks.items():
        layer, seen = f"{leaf.suffix[1:]}:{leaf}", on_ext4 / f"{vdev}.raw"
        xenbackend("image", "check", layer)
        xenbackend("image", "convert", "--quiet", layer, f"aio:{seen}")
        check(seen)
        assert (KEPT, f"{vdev}\n") == (read_file(seen, "/kept"), read_file(seen, "/mine"))


def write_into(vdev: str) -> str:
    """Return a guest's script that writes into the file system on a disk and verifies all of it."""
    return f"""
        set -e
        until [ -b /dev/{vdev} ]; do sleep 0.1; done
        mkdir /mnt/{vdev}
        mount -t ext4 /dev/{vdev} /mnt/{vdev}
        echo {vdev} >/mnt/{vdev}/mine
        {verify(f"/mnt/{vdev}/file", "4m")}
        umount /mnt/{vdev}
    """
