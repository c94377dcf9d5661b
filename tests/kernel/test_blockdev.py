"""Tests of `xenbackend.kernel.blockdev` on real files, and on block devices if the machine has them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.loops import loop
from xenbackend.errors import DriverError
from xenbackend.kernel import blockdev
from xenbackend.kernel.blockdev import Alignment, examine, switch_to_direct


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """Return the descriptor and path of a file with 1 MiB."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * (1 << 20))
    fd = os.open(path, os.O_RDWR)
    yield fd, str(path)
    os.close(fd)


def test_file(image: tuple[int, str]) -> None:
    """A regular file has its size and sectors of 512 bytes, and is not a device."""
    medium = examine(*image, read_only=False)

    assert (medium.size, medium.sector_size, medium.is_device) == (1 << 20, 512, False)


def test_discard_is_offered_where_holes_work(image: tuple[int, str]) -> None:
    """Discard is offered for a file that can have holes, in its file system's blocks, and makes zeros."""
    medium = examine(*image, read_only=False)
    if not medium.can_discard:
        pytest.skip("no holes in this file system")
    blockdev.discard(image[0], medium, 4096, 8192)

    assert medium.discard_granularity == os.fstat(image[0]).st_blksize
    assert os.pread(image[0], 16384, 0) == b"x" * 4096 + bytes(8192) + b"x" * 4096
    assert os.fstat(image[0]).st_size == 1 << 20


def test_read_only_image_cannot_discard(image: tuple[int, str]) -> None:
    """An image opened for reading only offers no discard."""
    medium = examine(*image, read_only=True)

    assert (medium.can_discard, medium.discard_granularity) == (False, 0)


def test_an_empty_file_is_no_disk(tmp_path: Path) -> None:
    """An empty file is refused with a sentence."""
    path = tmp_path / "image"
    path.write_bytes(b"")
    with path.open("rb") as file, pytest.raises(DriverError, match="is empty; an image needs at least one sector"):
        examine(file.fileno(), str(path), read_only=True)


@pytest.mark.parametrize(
    ("size", "asked", "whole"), [(1, 0, 512), (1000, 0, 1024), (1000, 4096, 4096), (4608, 4096, 8192)]
)
def test_part_of_a_sector(tmp_path: Path, size: int, asked: int, whole: int) -> None:
    """If a file ends inside a sector, readers see that sector whole; a writer is told how to make it so."""
    path = tmp_path / "image's file"
    path.write_bytes(bytes(size))
    with path.open("r+b") as file:
        medium = examine(file.fileno(), str(path), read_only=True, sector_size=asked)
        assert (whole, size, asked or 512) == (medium.size, medium.end, medium.sector_size)
        with pytest.raises(
            DriverError, match=f"has {size} bytes, which is not a multiple of its {asked or 512} byte"
        ) as caught:
            examine(file.fileno(), str(path), read_only=False, sector_size=asked)

    said = str(caught.value)
    assert "attach the disk read-only, or extend the file to a whole sector" in said
    subprocess.run(["/bin/sh", "-ec", said.rpartition(": ")[2]], check=True)
    assert whole == path.stat().st_size


def test_sectors_that_are_asked_for(image: tuple[int, str]) -> None:
    """A disk has the sector size that was asked for, and a physical sector of at least that size."""
    found = [examine(*image, read_only=False, sector_size=size) for size in (0, 512, 4096)]

    assert [512, 512, 4096] == [medium.sector_size for medium in found]
    assert 4096 <= found[2].physical_sector_size


@pytest.mark.parametrize(("stated", "physical"), [(None, 512), (512, 512), (4096, 4096), (3000, 512), (1 << 21, 512)])
def test_what_a_file_system_writes_at_once(
    image: tuple[int, str], monkeypatch: pytest.MonkeyPatch, stated: int | None, physical: int
) -> None:
    """A file's physical sector is the unit that its file system demands for direct I/O, if that is a valid size."""
    monkeypatch.setattr(blockdev, "_stated_alignment", lambda _fd: stated and Alignment(512, stated))

    assert physical == examine(*image, read_only=False).physical_sector_size


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
    """A directory, a pipe and a character device are refused, each by its kind."""
    os.mkfifo(tmp_path / "pipe")
    path = {"directory": str(tmp_path), "pipe": str(tmp_path / "pipe"), "zero": "/dev/zero"}[kind]
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(DriverError, match=words):
        examine(fd, path, read_only=True)

    os.close(fd)


def test_tmpfs_is_not_direct() -> None:
    """A file system that only has a page cache does not count as direct, even if it accepts the flag."""
    fd = os.memfd_create("image")
    os.ftruncate(fd, 1 << 20)

    assert switch_to_direct(fd, examine(fd, "memfd", read_only=False)) is None
    os.close(fd)


def test_tolerating_is_not_direct(image: tuple[int, str]) -> None:
    """A file from which one byte can be read to an odd address goes through the page cache, whatever its flags say."""
    assert blockdev._tried_alignment(image[0], examine(*image, read_only=False)) is None


def test_stated_and_tried_alignment_agree() -> None:
    """The alignment found by reading is at least the one that the file system states, so either can be used."""
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
    """An image whose end is not a multiple of the medium's block stays cached: direct I/O could not write its tail."""
    monkeypatch.setattr(blockdev, "_stated_alignment", lambda _fd: Alignment(4096, 4096))
    medium = replace(examine(*image, read_only=False), end=(1 << 20) - 512)

    assert switch_to_direct(image[0], medium) is None


@pytest.mark.parametrize(("said", "physical"), [(512, 512), (4096, 4096), (0, 512), (3000, 512), (1 << 21, 512)])
def test_what_a_device_writes_at_once(
    image: tuple[int, str], monkeypatch: pytest.MonkeyPatch, said: int, physical: int
) -> None:
    """A device's physical sector is the one that it states, if a guest can use that."""
    answers = {
        blockdev.BLKGETSIZE64: (1 << 20).to_bytes(8, sys.byteorder),
        blockdev.BLKSSZGET: (512).to_bytes(4, sys.byteorder),
        blockdev.BLKPBSZGET: said.to_bytes(4, sys.byteorder),
    }
    monkeypatch.setattr(blockdev.fcntl, "ioctl", lambda _fd, number, _room: answers[number])

    assert physical == blockdev._device(image[0], os.makedev(0, 0)).physical_sector_size


@pytest.mark.parametrize(
    ("unit", "sector", "end", "offset"),
    [(1, 512, 1 << 20, 512), (512, 4096, 1 << 20, 512), (4096, 512, 1 << 20, 4096), (1, 512, 511, None)],
)
def test_what_is_tried(
    image: tuple[int, str], monkeypatch: pytest.MonkeyPatch, unit: int, sector: int, end: int, offset: int | None
) -> None:
    """Trial reads use only ranges that the medium has for certain, whatever sectors its disk shows."""
    monkeypatch.setattr(blockdev, "_reads", lambda _fd, shift, length: not shift and length >= 512)
    medium = replace(examine(*image, read_only=False), unit=unit, sector_size=sector, end=end)
    found = blockdev._tried_alignment(image[0], medium)

    assert offset == (found and found.offset)


def test_block_device() -> None:
    """A block device has the size and the sectors that the kernel states, and is a device."""
    for device in sorted(Path("/sys/block").glob("[vsn]*")):
        try:
            fd = os.open(f"/dev/{device.name}", os.O_RDONLY)
        except OSError:
            continue
        medium = examine(fd, device.name, read_only=True)
        os.close(fd)

        assert medium.size == int((device / "size").read_text()) * 512
        assert medium.sector_size == int((device / "queue/logical_block_size").read_text())
        assert medium.physical_sector_size == int((device / "queue/physical_block_size").read_text())
        assert medium.is_device
        return
    pytest.skip("no readable block device here")


@pytest.mark.slow
def test_a_device_with_large_sectors(tmp_path: Path) -> None:
    """A device with 4096-byte sectors says so; as a disk with 512-byte sectors it is written in units of eight."""
    with loop(tmp_path / "disk", 1 << 20, sector_size=4096) as (device, _):
        fd = os.open(device, os.O_RDWR)
        own, shown = examine(fd, device, read_only=False), examine(fd, device, read_only=False, sector_size=512)
        os.close(fd)

    assert (4096, 4096, 4096) == (own.sector_size, own.physical_sector_size, own.unit)
    assert replace(own, sector_size=512) == shown


@pytest.mark.slow
def test_discards_of_a_device_with_large_sectors(tmp_path: Path) -> None:
    """Only whole sectors of the device are discarded; a discard that covers none is no error, and changes nothing."""
    with loop(tmp_path / "disk", 1 << 20, sector_size=4096) as (device, path):
        fd = os.open(device, os.O_RDWR)
        os.pwrite(fd, b"x" * 32768, 0)
        os.fsync(fd)
        medium = examine(fd, device, read_only=False, sector_size=512)
        for offset, length in ((512, 512), (3584, 1024), (8192 - 512, 8192 + 1024)):
            blockdev.discard(fd, medium, offset, length)
        os.close(fd)
        if not medium.can_discard:
            pytest.skip("this device cannot discard")

        assert b"x" * 8192 + bytes(8192) + b"x" * 16384 == path.read_bytes()[:32768]
