"""Tests of `xenbackend.kernel.loops`: an image is found by its file, each loop device over it, and their partitions."""

from __future__ import annotations

import os
from pathlib import Path

from descriptors import open_descriptors

from tests.loops import bound, over, partition
from xenbackend.kernel.loops import faces


def paths(path: str | Path) -> list[str]:
    """Return the other files and loop devices that show the same image."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with faces(fd) as found:
            assert all(os.fstat(each.fd) for each in found)
            assert [each.path.startswith("/dev/") for each in found] == [each.is_device for each in found]
            return sorted(each.path for each in found)
    finally:
        os.close(fd)


def test_all_faces_are_found_from_each(tmp_path: Path) -> None:
    """All of them are found from each one, in both directions; the descriptors are closed again."""
    image, other = tmp_path / "image", tmp_path / "other"
    for path in (image, other):
        path.write_bytes(bytes(1 << 20))
    before = open_descriptors()
    with over(image) as first, over(image) as second, over(first) as upper, over(other) as foreign:
        family = {str(image), first, second, upper}
        for path in family:
            assert sorted(family - {path}) == paths(path)
        assert [foreign] == paths(other)
        assert [str(other)] == paths(foreign)
    assert [] == paths(image)
    assert before == open_descriptors()


def test_the_file_counts_and_not_its_name(tmp_path: Path) -> None:
    """A file that was renamed, removed or has two names is found; one that has taken its name is not."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with over(image) as device:
        moved = image.rename(tmp_path / "moved")
        image.write_bytes(bytes(1 << 20))
        assert [device] == paths(moved)
        assert [str(moved)] == paths(device)
        assert [] == paths(image)
        (tmp_path / "linked").hardlink_to(moved)
        assert [device] == paths(tmp_path / "linked")
        (tmp_path / "linked").unlink()
        with moved.open("rb") as file:
            moved.unlink()
            with faces(file.fileno()) as found:
                assert [device] == [each.path for each in found]
        assert [] == paths(device)


def test_a_disk_and_its_partitions(tmp_path: Path) -> None:
    """A partition is found from its disk and from the file below, and they from the partition; another one is not."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    before = open_descriptors()
    with over(image) as device, partition(device) as first, partition(device, 2) as second:
        assert sorted([device, first, second]) == paths(image)
        assert sorted([str(image), first, second]) == paths(device)
        assert sorted([str(image), device]) == paths(first)
        assert sorted([str(image), device]) == paths(second)
    assert before == open_descriptors()


def test_where_the_data_are_decides(tmp_path: Path) -> None:
    """Loop devices over parts of one file, and partitions of several, are faces of one another if the parts overlap."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    with (
        over(image) as whole,
        partition(whole) as first,
        partition(whole, 2) as second,
        over(image, "--offset=1M", "--sizelimit=4M") as same,
        over(image, "--offset=9M") as end,
    ):
        everything = {str(image), whole, first, second, same, end}
        for path, apart in (
            (image, set()),
            (whole, set()),
            (first, {second, end}),
            (second, {first, same, end}),
            (same, {second, end}),
            (end, {first, second, same}),
        ):
            assert sorted(everything - apart - {str(path)}) == paths(path), path


def test_what_claims_say_already(tmp_path: Path) -> None:
    """A claim on a disk is one on its partitions, so theirs are not looked at twice: one of them may be our own."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    with over(image) as device, partition(device) as part, Path(part).open("rb") as file, faces(file.fileno()) as found:
        assert {device: True, str(image): False} == {each.path: each.shares_claim for each in found}
    with over(image) as device, image.open("rb") as file, faces(file.fileno()) as found:
        assert [(device, False)] == [(each.path, each.shares_claim) for each in found]


def test_a_file_that_is_mounted_under_another_name(tmp_path: Path) -> None:
    """A loop device over a file is found by each name that the file has, and the file by the device."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with bound(image, tmp_path / "another name") as other:
        with over(other) as device:
            assert [device] == paths(image) == paths(other)
            assert [str(other)] == paths(device)
        with over(image) as device:
            assert [device] == paths(image) == paths(other)
