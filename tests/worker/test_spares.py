"""Tests of `xenbackend.worker.spares`: nobody else gets an image between two chains of one disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from descriptors import open_descriptors

from tests import loops, places, qemu
from xenbackend.errors import DriverError
from xenbackend.kernel import locks
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.files import HostFiles
from xenbackend.worker.spares import Spares

SIZE = 1 << 20


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Return a reactor."""
    made = Reactor()
    yield made
    made.close()


@pytest.fixture
def files(reactor: Reactor) -> Iterator[HostFiles]:
    """Return the files of a worker."""
    files = HostFiles(reactor)
    yield files
    files.close()


@pytest.fixture
def other(reactor: Reactor) -> Iterator[HostFiles]:
    """Return the files of another worker."""
    files = HostFiles(reactor)
    yield files
    files.close()


@pytest.fixture
def path() -> Iterator[str]:
    """Return the path of an image on a disk."""
    with places.directory(places.DISK) as directory:
        (directory / "image").write_bytes(bytes(SIZE))
        yield f"{directory}/image"


def test_an_image_stays_locked_until_it_is_open_again(files: HostFiles, other: HostFiles, path: str) -> None:
    """An image that is closed and not open again yet is refused to all others, QEMU included; then the same file
    description is used.
    """
    before = open_descriptors()
    image = files.open(path, read_only=False)
    os.lseek(image.fd, 4711, os.SEEK_SET)  # a property of the file description
    with files.kept():
        image.close()
        with pytest.raises(DriverError, match="is locked"):
            other.open(path, read_only=True)
        assert "lock" in qemu.refusal("qemu-io", "-f", "raw", "-c", "write 0 512", path)
        image = files.open(path, read_only=False)
    assert 4711 == os.lseek(image.fd, 0, os.SEEK_CUR)
    with pytest.raises(DriverError, match="is locked"):
        other.open(path, read_only=True)
    image.close()
    assert before == open_descriptors()


def test_a_claim_is_taken_over(files: HostFiles, tmp_path: Path) -> None:
    """A block device stays claimed too, even if it is opened again through another node."""
    with loops.loop(tmp_path / "disk", SIZE, sector_size=512) as (device, _):
        node = tmp_path / "node"
        os.mknod(node, 0o60600, Path(device).stat().st_rdev)
        image = files.open(device, read_only=False)
        for name in (device, str(node)):
            with files.kept():
                image.close()
                with pytest.raises(OSError, match="busy"):
                    os.open(device, os.O_RDWR | os.O_EXCL)
                image = files.open(name, read_only=False)
            with pytest.raises(OSError, match="busy"):
                os.open(device, os.O_RDWR | os.O_EXCL)
        image.close()
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))


def test_a_partition_that_has_grown_is_taken_over(files: HostFiles, tmp_path: Path) -> None:
    """A partition that has grown, and so has another identity, is taken over too, without waiting for its own claim."""
    with loops.loop(tmp_path / "disk", 16 << 20, sector_size=512) as (device, _), loops.partition(device) as part:
        image = files.open(part, read_only=False)
        with files.kept():
            image.close()
            loops.grow_partition(device, 8 << 20)
            image = files.open(part, read_only=False)
            assert files._spares.are_kept  # else it would have been released and opened anew
        assert 8 << 20 == image.medium.size
        with pytest.raises(OSError, match="busy"):
            os.open(part, os.O_RDWR | os.O_EXCL)
        image.close()


def test_a_partition_that_grows_is_the_only_one_whose_identity_may_change(files: HostFiles, path: str) -> None:
    """Only a larger partition at the same place counts as the kept one: another place, medium or a smaller size does
    not, nor does a file.
    """
    image = files.open(path, read_only=False)
    access = locks.access(read_only=False, shareable=False)
    spares = Spares()
    spares.note(image, "device number=2049 sequence=7 start=1048576 size=4194304", access)
    taken = {}
    with spares.kept():
        image.close()
        for identity in (
            "device number=2049 sequence=7 start=2097152 size=8388608",
            "device number=2049 sequence=8 start=1048576 size=8388608",
            "device number=2049 sequence=7 start=1048576 size=2097152",
            "device number=2049 sequence=7",
            "file device=2049 inode=7",
            "",
            "device number=2049 sequence=7 start=1048576 size=8388608",
        ):
            taken[identity] = spares.take(identity, access)

    *others, grown = taken.values()
    assert [-1] * 6 == others
    assert grown >= 0
    os.close(grown)


def test_what_is_not_taken_over_is_let_go(files: HostFiles, other: HostFiles, path: str) -> None:
    """After the exchange, or an error, images that the new chain does not have are released."""
    image = files.open(path, read_only=False)
    with suppress(KeyError), files.kept():
        image.close()
        raise KeyError
    other.open(path, read_only=False).close()


def test_a_leaf_becomes_a_parent(files: HostFiles, other: HostFiles, path: str) -> None:
    """An image that is needed with another access is opened anew, and then others may read it."""
    image = files.open(path, read_only=False)
    with files.kept():
        image.close()
        image = files.open(path, read_only=True)
        other.open(path, read_only=True).close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(image.fd, b"x", 0)
    image.close()


def test_another_face_of_an_image(files: HostFiles, tmp_path: Path) -> None:
    """A kept image is not in the way of its own disk: a loop device can replace the file below it."""
    (tmp_path / "image").write_bytes(bytes(SIZE))
    with loops.over(tmp_path / "image") as device:
        image = files.open(str(tmp_path / "image"), read_only=False)
        with files.kept():
            image.close()
            image = files.open(device, read_only=False)
        image.close()


def test_twice_in_one_chain_is_refused(files: HostFiles, path: str) -> None:
    """A file that the new chain has open already is refused a second time."""
    image = files.open(path, read_only=False)
    with files.kept():
        image.close()
        image = files.open(path, read_only=False)
        with pytest.raises(DriverError, match="is locked"):
            files.open(path, read_only=False)
    image.close()


def test_another_file_of_the_name_is_another_one(files: HostFiles, path: str) -> None:
    """A kept file is recognised by the file itself, and not by its name."""
    image = files.open(path, read_only=False)
    with files.kept():
        image.close()
        Path(path).unlink()
        Path(path).write_bytes(b"n" * SIZE)
        image = files.open(path, read_only=False)
    assert b"n" * 8 == image.read_at(0, 8)
    image.close()


def test_how_io_is_done_is_chosen_anew(files: HostFiles, path: str) -> None:
    """The way of doing I/O is chosen again for each chain: one may bypass the page cache, and the next may use it."""
    image = files.open(path, read_only=False)
    modes = [image.mode]
    for direct in (False, True):
        with files.kept():
            image.close()
            image = files.open(path, read_only=False, direct=direct)
        modes.append(image.mode)
        assert b"\0" * 3 == image.read_at(1, 3)
    image.close()
    if not modes[0].startswith("O_DIRECT"):
        pytest.skip("no direct I/O there")
    assert ["O_DIRECT", "page cache", "O_DIRECT"] == [mode.partition(",")[0] for mode in modes]
