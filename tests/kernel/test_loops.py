"""Tests of `xenbackend.kernel.loops`: an image is found by its file and each loop device over it, and no other is."""

from __future__ import annotations

import os
from pathlib import Path

from descriptors import open_descriptors

from tests.loops import over
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
