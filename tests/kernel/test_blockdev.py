"""Tests of `xenbackend.kernel.blockdev` on real files; block devices where the machine lets us look at one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.errors import DriverError
from xenbackend.kernel import blockdev
from xenbackend.kernel.blockdev import Alignment, Medium, examine, switch_to_direct


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """Return the descriptor and path of a file with 1 MiB."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * (1 << 20))
    fd = os.open(path, os.O_RDWR)
    yield fd, str(path)
    os.close(fd)


def test_file(image: tuple[int, str]) -> None:
    """A regular file has its size, sectors of 512 bytes, and is no device."""
    medium = examine(*image, read_only=False)

    assert (medium.size, medium.sector_size, medium.is_device) == (1 << 20, 512, False)


def test_discard_is_offered_where_holes_work(image: tuple[int, str]) -> None:
    """Discard is offered for a file that can have holes, in its file system's blocks, and then makes zeros."""
    medium = examine(*image, read_only=False)
    if not medium.can_discard:
        pytest.skip("no holes in this file system")
    blockdev.discard(image[0], medium, 4096, 8192)

    assert medium.discard_granularity == os.fstat(image[0]).st_blksize
    assert os.pread(image[0], 16384, 0) == b"x" * 4096 + bytes(8192) + b"x" * 4096
    assert os.fstat(image[0]).st_size == 1 << 20


def test_read_only_image_cannot_discard(image: tuple[int, str]) -> None:
    """What is opened for reading only offers no discard."""
    medium = examine(*image, read_only=True)

    assert (medium.can_discard, medium.discard_granularity) == (False, 0)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [(0, "is empty; an image has at least one sector"), (1000, "has 1000 bytes, which is no multiple of its 512 byte")],
)
def test_sizes_that_are_no_disk(tmp_path: Path, size: int, sentence: str) -> None:
    """A file that is empty or has part of a sector is refused, with a sentence that says so."""
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    with path.open("rb") as file, pytest.raises(DriverError, match=sentence):
        examine(file.fileno(), str(path), read_only=True)


def test_files_that_end_anywhere(tmp_path: Path) -> None:
    """For image formats a file may end inside a sector, but not be empty."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1000))
    with path.open("rb") as file:
        assert examine(file.fileno(), str(path), read_only=True, ends_anywhere=True).size == 1000


@pytest.mark.parametrize(
    ("kind", "words"), [("directory", "is a directory"), ("pipe", "is a pipe"), ("zero", "is a character device")]
)
def test_kinds_that_are_no_image(tmp_path: Path, kind: str, words: str) -> None:
    """A directory, a pipe and a character device are refused, each by its name."""
    os.mkfifo(tmp_path / "pipe")
    path = {"directory": str(tmp_path), "pipe": str(tmp_path / "pipe"), "zero": "/dev/zero"}[kind]
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(DriverError, match=words):
        examine(fd, path, read_only=True)

    os.close(fd)


def test_tmpfs_is_not_direct() -> None:
    """A file system that has only a page cache is not taken for direct, even if it tolerates the flag."""
    fd = os.memfd_create("image")
    os.ftruncate(fd, 1 << 20)

    assert switch_to_direct(fd, examine(fd, "memfd", read_only=False)) is None
    os.close(fd)


def test_tolerating_is_not_direct(image: tuple[int, str]) -> None:
    """A file that reads a single byte to an odd address goes through the page cache, whatever its flags say."""
    assert blockdev._tried_alignment(image[0], examine(*image, read_only=False)) is None


def test_stated_and_tried_alignment_agree() -> None:
    """What reading finds out is no less than what the file system states, so either can be relied upon."""
    fd = os.open("/var/tmp", os.O_RDWR | os.O_TMPFILE)
    os.pwrite(fd, bytes(1 << 20), 0)
    medium = examine(fd, "image", read_only=False)
    stated = switch_to_direct(fd, medium)
    tried = blockdev._tried_alignment(fd, medium)
    os.close(fd)
    if stated is None or tried is None:
        pytest.skip("no direct I/O there")

    assert tried.offset == stated.offset
    assert tried.memory >= stated.memory


def test_tail_that_direct_io_cannot_write(image: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose end is no multiple of the medium's block stays cached: its tail could not be written alone."""
    monkeypatch.setattr(blockdev, "_stated_alignment", lambda _fd: Alignment(4096, 4096))
    medium = Medium((1 << 20) - 512, 512, is_device=False, can_discard=False, discard_granularity=0)

    assert switch_to_direct(image[0], medium) is None


def test_block_device() -> None:
    """A block device has the size and the sectors that the kernel says, and is a device."""
    for device in sorted(Path("/sys/block").glob("[vsn]*")):
        try:
            fd = os.open(f"/dev/{device.name}", os.O_RDONLY)
        except OSError:
            continue
        medium = examine(fd, device.name, read_only=True)
        os.close(fd)

        assert medium.size == int((device / "size").read_text()) * 512
        assert medium.sector_size == int((device / "queue/logical_block_size").read_text())
        assert medium.is_device
        return
    pytest.skip("no readable block device here")
