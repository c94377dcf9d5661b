"""Tests of `xenbackend.kernel.partitions`."""

from __future__ import annotations

from pathlib import Path

from tests.loops import loop, partition
from xenbackend.kernel import partitions
from xenbackend.kernel.partitions import Partition


def number(device: str) -> int:
    """Return the number of a device."""
    return Path(device).stat().st_rdev


def test_each_knows_the_other(tmp_path: Path) -> None:
    """A disk has its partitions, and each of them has its disk, with the place in bytes whatever the sectors are."""
    for sector_size in (512, 4096):
        with (
            loop(tmp_path / "disk", 16 << 20, sector_size=sector_size) as (disk, _),
            partition(disk) as first,
            partition(disk, 2) as second,
        ):
            name = Path(disk).name
            assert [
                Partition(f"{name}p1", number(first), 1 << 20, 4 << 20),
                Partition(f"{name}p2", number(second), 5 << 20, 4 << 20),
            ] == list(partitions.of(number(disk)))
            assert Partition(name, number(disk), 5 << 20, 4 << 20) == partitions.within(number(second))
            assert [] == list(partitions.of(number(second)))
            assert partitions.within(number(disk)) is None


def test_what_is_not_there_has_none() -> None:
    """A number that no device has is no partition, and has none."""
    assert partitions.within(0xFFF << 20) is None
    assert [] == list(partitions.of(0xFFF << 20))
