"""Tests of `xenbackend.kernel.blkback` on a bus made of files; tests/xen has the real one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import loops
from xenbackend.kernel import blkback

Serve = Callable[..., None]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Return a function that adds a disk to the bus, as if the kernel served a device to a guest."""
    bus = tmp_path / "bus"
    bus.mkdir()
    monkeypatch.setattr(blkback, "BUS", str(bus))

    def serve(name: str, number: int | None, mode: str = "w") -> None:
        (bus / name).mkdir()
        if number is not None:
            (bus / name / "physical_device").write_text(f"{os.major(number):x}:{os.minor(number):x}\n")
            (bus / name / "mode").write_text(f"{mode}\n")

    return serve


def test_a_device_that_the_kernel_serves(serve: Serve) -> None:
    """Device numbers are hexadecimal, as the kernel writes them; vbds without a device and other kinds do not count."""
    number = os.makedev(0x1FD, 0x1A)
    serve("vbd-5-51712", number)
    serve("vbd-6-51728", os.makedev(8, 1))
    serve("vbd-7-51728", None)
    serve("vif-8-0", number)
    serve("vbd-notone", number)

    assert ["5/xvda"] == list(blkback.disks_on(number))
    assert ["6/xvdb"] == list(blkback.disks_on(os.makedev(8, 1)))
    assert [] == list(blkback.disks_on(os.makedev(8, 2)))


@pytest.mark.parametrize(("mode", "by_writers"), [("r", []), ("w", ["5/xvda"]), ("w!", ["5/xvda"])])
def test_who_only_reads(serve: Serve, mode: str, by_writers: list[str]) -> None:
    """Guests that only read are in the way of writers only."""
    serve("vbd-5-51712", os.makedev(8, 1), mode)

    assert ["5/xvda"] == list(blkback.disks_on(os.makedev(8, 1)))
    assert by_writers == list(blkback.disks_on(os.makedev(8, 1), by_writers=True))


def test_partitions_and_disks(serve: Serve, tmp_path: Path) -> None:
    """A partition in use counts for its disk, and a disk for its partitions."""
    with loops.loop(tmp_path / "disk", 16 << 20, sector_size=512) as (device, _), loops.partition(device) as part:
        disk_number, part_number = (Path(each).stat().st_rdev for each in (device, part))
        serve("vbd-5-51712", part_number)
        assert ["5/xvda"] == list(blkback.disks_on(disk_number))
        serve("vbd-6-51712", disk_number)
        assert ["5/xvda", "6/xvda"] == list(blkback.disks_on(part_number))


def test_a_host_without_xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Xen's bus nothing is served."""
    monkeypatch.setattr(blkback, "BUS", str(tmp_path / "bus"))
    assert [] == list(blkback.disks_on(os.makedev(8, 1)))
