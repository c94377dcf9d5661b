"""The cache of the test bed's images (`tests/xen/bed/image.py`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.xen.bed.image import KEPT, cached, key_of


def built(cache: Path, name: str) -> Path:
    """Return a directory of the cache, made with a file in it."""
    return cached(cache, name, lambda place: (place / "file").write_text(name))


def test_an_image_is_built_once(tmp_path: Path) -> None:
    """An image in the cache is used without building it again."""
    first = built(tmp_path, "image-1")
    second = cached(tmp_path, "image-1", lambda _: pytest.fail("built again"))

    assert (first, "image-1") == (second, (second / "file").read_text())


def test_a_build_that_failed_is_never_used(tmp_path: Path) -> None:
    """The draft of a failed build is not taken for an image, and the next build starts from nothing."""

    def fail(place: Path) -> None:
        (place / "half").write_text("")
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        cached(tmp_path, "image-1", fail)

    assert ["file"] == [file.name for file in built(tmp_path, "image-1").iterdir()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_what_a_build_had_mounted_outlives_it(tmp_path: Path) -> None:
    """What an interrupted build has mounted in its draft, such as the host's /dev/shm, survives the draft's removal."""
    theirs, there = tmp_path / "shm", tmp_path / "cache/image-1.partial/dev/shm"
    theirs.mkdir()
    (theirs / "file").write_text("")
    there.mkdir(parents=True)
    subprocess.run(["mount", "--bind", theirs, there], check=True)
    try:
        built(tmp_path / "cache", "image-1")
    finally:
        subprocess.run(["umount", there], check=False, capture_output=True)

    assert ["file"] == [each.name for each in theirs.iterdir()]
    assert not there.exists()


def test_old_images_go(tmp_path: Path) -> None:
    """Of each release only the images used last are kept."""
    built(tmp_path, "image-4.17-1")
    for number in range(KEPT + 1):
        os.utime(built(tmp_path, f"image-4.20-{number}"), (number, number))
    built(tmp_path, "image-4.20-9")

    assert {"image-4.20-2", "image-4.20-9", "image-4.17-1", "lock"} == {each.name for each in tmp_path.iterdir()}


def test_a_changed_recipe_has_another_key(tmp_path: Path) -> None:
    """Every byte of every file changes the key, and so does a file's name."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("1")
    keys = [key_of([one]), key_of([two]), key_of([one, two])]
    one.write_text("2")

    assert 4 == len({*keys, key_of([one])})
