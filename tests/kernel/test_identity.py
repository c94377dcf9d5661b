"""Tests of `xenbackend.kernel.identity` on real files, and on loop devices and partitions if the machine has them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests import places
from tests.loops import give, loop
from xenbackend.errors import KernelError
from xenbackend.kernel.identity import (
    DeviceIdentity,
    FileIdentity,
    Identity,
    difference,
    from_text,
    has_grown,
    identify,
    to_text,
)

FILE = FileIdentity(device=2049, inode=12, handle="1:0c000000deadbeef")
DEVICE = DeviceIdentity(number=os.makedev(7, 1), sequence=40)
PART = DeviceIdentity(number=os.makedev(8, 3), sequence=40, start=1 << 20, size=8 << 20)


@contextmanager
def opened(path: str | Path, flags: int = os.O_PATH) -> Iterator[int]:
    """Open a file while the block lasts."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def of(path: str | Path, flags: int = os.O_PATH) -> Identity:
    """Return the identity of what a name means now."""
    with opened(path, flags) as fd:
        return identify(fd)


@pytest.fixture(params=[*places.OUTSIDE[:2]], ids=["memory", "disk"])
def home(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory in memory, and one on a disk."""
    with places.directory(request.param) as path:
        yield path


def make(path: Path, text: str = "x") -> Path:
    """Write a file."""
    path.write_text(text)
    return path


def test_the_way_of_opening_makes_no_difference(home: Path) -> None:
    """Descriptors opened with O_PATH and for I/O have the same identity."""
    path = make(home / "image")

    assert of(path) == of(path, os.O_RDWR) == of(path, os.O_RDONLY)


def test_every_name_of_a_file_has_its_identity(home: Path) -> None:
    """A hard link, a symbolic link and a new name lead to the same identity, even after a change of the contents."""
    path, before = make(home / "image"), of(home / "image")
    os.link(path, home / "hard")
    (home / "soft").symlink_to(path)
    path.rename(home / "renamed")
    (home / "renamed").write_text("longer than before")

    assert [of(home / "hard"), of(home / "renamed")] == [before] * 2
    path.symlink_to("hard")
    assert of(home / "soft") == before


def test_a_deleted_file_has_its_identity_still(home: Path) -> None:
    """A file without a name keeps its identity."""
    path = make(home / "image")
    with opened(path) as fd:
        before = identify(fd)
        path.unlink()

        assert identify(fd) == before


def test_a_copy_is_another_file(home: Path) -> None:
    """A copy with the same contents has another identity, and the sentence names both inodes."""
    one, two = of(make(home / "one")), of(make(home / "two"))
    assert isinstance(one, FileIdentity)
    assert isinstance(two, FileIdentity)

    assert difference(one, two) == f"it is another file, inode {two.inode}, not {one.inode}"


def test_a_file_with_the_inode_of_a_former_one_is_another(home: Path) -> None:
    """A file made anew has another identity, even if the file system reuses the device and inode numbers."""
    path, seen = home / "image", []
    for _ in range(64):
        seen.append(of(make(path)))
        path.unlink()

    assert len(set(seen)) == len(seen)


def test_a_file_of_a_file_system_without_handles_is_told_by_its_birth() -> None:
    """Without file handles the time of birth tells a file from a later one with the same inode."""
    one = FileIdentity(device=1, inode=2, born=1000)

    assert difference(one, replace(one)) == ""
    assert "made again with the inode number 2" in difference(one, replace(one, born=1001))
    assert difference(one, replace(one, born=0)) == ""  # no known part differs


def test_an_identity_can_be_stored_as_a_text(home: Path) -> None:
    """An identity stored as a text is read back equal."""
    for identity in (of(make(home / "image")), FILE, replace(FILE, handle="", born=5), DEVICE, PART):
        assert from_text(to_text(identity)) == identity


@pytest.mark.parametrize(
    "text",
    [
        "",
        "file",
        "pipe device=1 inode=2",
        "file device=1",
        "file device=1 inode=x",
        "file device=1 inode=2 size=3",
        "file device=1 inode=02",
        "file device=1 inode=2 inode=2",
        "file inode=2 device=1",
        "file device=1  inode=2",
        "device number=1 sequence=-1",
        f"file device=1 inode=2 handle={'a' * 600}",
    ],
)
def test_no_other_text_is_an_identity(text: str) -> None:
    """A text that is no stored identity is refused."""
    with pytest.raises(ValueError, match="not an identity"):
        from_text(text)


@pytest.mark.parametrize(
    ("noted", "found", "sentence"),
    [
        (FILE, FILE, ""),
        (FILE, replace(FILE, device=2050), "it is another file, on device 8:2, not 8:1"),
        (FILE, replace(FILE, inode=13), "it is another file, inode 13, not 12"),
        (
            FILE,
            replace(FILE, handle="1:0c00000000000001"),
            "it is another file, made again with the inode number 12 of the former one",
        ),
        (FILE, DEVICE, "it is now a block device, but was a file"),
        (DEVICE, FILE, "it is now a file, but was a block device"),
        (DEVICE, DEVICE, ""),
        (
            DEVICE,
            replace(DEVICE, number=os.makedev(7, 2)),
            "it is another block device, 7:2, not 7:1",
        ),
        (
            DEVICE,
            replace(DEVICE, sequence=41),
            "block device 7:1 has another disk or medium, with sequence number 41, not 40",
        ),
        (
            PART,
            replace(PART, start=2 << 20),
            "partition 8:3 has 8388608 bytes from byte 2097152, but had 8388608 from byte 1048576",
        ),
        (
            PART,
            replace(PART, size=9 << 20),
            "partition 8:3 has 9437184 bytes from byte 1048576, but had 8388608 from byte 1048576",
        ),
    ],
)
def test_the_difference_is_named(noted: Identity, found: Identity, sentence: str) -> None:
    """Each part of an identity that differs is named with its new and its old value."""
    assert difference(noted, found) == sentence


def test_a_partition_may_grow() -> None:
    """A partition may only have grown: it must begin at the same place on the same disk, and be larger."""
    larger = replace(PART, size=PART.size + 512)

    assert has_grown(PART, larger)
    assert not any(
        has_grown(noted, found)
        for noted, found in (
            (PART, PART), (larger, PART), (PART, replace(larger, sequence=41)), (PART, replace(larger, start=0)),
            (PART, replace(larger, number=5)), (DEVICE, replace(DEVICE, size=512)), (FILE, larger), (PART, FILE),
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["directory", "pipe", "character device"])
def test_nothing_else_has_an_identity(home: Path, kind: str) -> None:
    """A directory, a pipe and a character device are refused without being opened."""
    path = home / "it"
    match kind:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            path = Path("/dev/null")
    with pytest.raises(KernelError, match="neither a regular file nor a block device") as caught:
        of(path)

    assert caught.value.errno == errno.EINVAL


def test_a_device_is_the_same_until_its_medium_is_another(tmp_path: Path) -> None:
    """A loop device that grows stays the same device; one that was given another file does not, despite its name."""
    other = tmp_path / "other"
    with loop(tmp_path / "one", 1 << 20, sector_size=512) as (device, file):
        before = of(device)
        assert of(device, os.O_RDONLY) == before
        os.truncate(file, 2 << 20)
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        assert of(device) == before
        with opened(device) as fd:
            shutil.copy(file, other)
            give(device, other)

            assert "has another disk or medium" in difference(before, of(device))
            assert identify(fd) == of(device)  # the node that was opened by O_PATH leads to the new medium


def test_a_partition_is_the_same_only_in_its_place(tmp_path: Path) -> None:
    """A partition that was made anew in another place is another one, despite its name; its disk is the same."""
    if not shutil.which("addpart"):
        pytest.skip("addpart is not installed (Debian: util-linux-extra)")
    with ExitStack() as undo, loop(tmp_path / "disk", 8 << 20, sector_size=512) as (device, _):
        give(device, tmp_path / "disk", "--partscan")
        whole, part = of(device), Path(f"{device}p1")

        def place(start: int, length: int) -> Identity:
            """Make the partition, sizes in sectors, and return its identity."""
            if subprocess.run(["addpart", device, "1", str(start), str(length)], check=False).returncode:
                pytest.skip("no partitions of loop devices here")
            return of(part)

        undo.callback(subprocess.run, ["delpart", device, "1"], check=False, capture_output=True)
        first = place(2048, 1024)
        assert isinstance(first, DeviceIdentity)
        assert (first.start, first.size) == (1 << 20, 512 << 10)
        subprocess.run(["delpart", device, "1"], check=True)
        moved = place(4096, 1024)
        assert isinstance(moved, DeviceIdentity)
        moved = replace(moved, number=first.number)  # the next partition may have it or another one
        subprocess.run(["delpart", device, "1"], check=True)
        again = place(2048, 1024)
        assert isinstance(again, DeviceIdentity)

        assert "from byte 2097152, but had 524288 from byte 1048576" in difference(first, moved)
        assert replace(again, number=first.number) == first
        assert of(device) == whole
