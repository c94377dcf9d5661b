"""Images for the tests of image commands: one disk's content, in a raw file and in any format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.qemu import qemu_img
from xenbackend.block.formats.table import FORMATS
from xenbackend.image.names import Image, find_image

SIZE = 5 << 20
DATA = {64 << 10: 200 << 10, 3 << 20: 4096, SIZE - 512: 512}  # where data other than zeros are, and how many bytes


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a directory in memory. On a disk, the many syncs of these tests would take half a minute."""
    with tempfile.TemporaryDirectory(prefix="xb-image-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Return a sparse raw image with data in three places."""
    path, chance = tmp_path / "disk.raw", Random(1)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for place, length in DATA.items():
            file.seek(place)
            file.write(chance.randbytes(length))
    return path


@pytest.fixture
def made(raw: Path, tmp_path: Path) -> Callable[[str], Image]:
    """Return a function by which QEMU makes an image of any format with that content."""

    def make(image_format: str) -> Image:
        path = tmp_path / f"disk.{image_format}"
        options = ["-o", "force_size"] if image_format == "vhd" else []
        qemu_img("convert", "-f", "raw", "-O", FORMATS[image_format].qemu_name, *options, raw, path)
        return find_image(f"{image_format}:{path}")

    return make
