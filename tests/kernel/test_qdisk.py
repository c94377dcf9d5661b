"""Tests of `xenbackend.kernel.qdisk` on a bus made of files, with processes of QEMU's name."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests import loops
from xenbackend.errors import DriverError
from xenbackend.kernel import blkback, qdisk
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.files import HostFiles

_HOLDS = """
import os, sys
from xenbackend.kernel import process
process.rename(sys.argv[1])
fd = os.open(sys.argv[2], {"r": os.O_RDONLY, "w": os.O_RDWR, "o": os.O_WRONLY}[sys.argv[3]])
print(1, flush=True)
input()
"""
QEMU = "xen-qemu-system-i386"  # Debian's; the kernel keeps 15 characters


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the bus on which the kernel shows a disk of QEMU's."""
    bus = tmp_path / "bus"
    (bus / "qdisk-5-51712").mkdir(parents=True)
    monkeypatch.setattr(blkback, "BUS", str(bus))
    monkeypatch.setattr(qdisk, "SOCKETS", str(tmp_path / "sockets"))
    return bus


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@contextmanager
def opened_by(name: str, path: Path | str, mode: str = "w") -> Iterator[int]:
    """Let a process of this name hold a file open without a lock, and yield its number."""
    with subprocess.Popen([sys.executable, "-c", _HOLDS, name, path, mode], stdin=-1, stdout=-1) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.stdin.write(b"\n")
            process.stdin.close()


def users_of(path: Path | str, *, by_writers: bool = False) -> list[str]:
    """Return the descriptions of those who use a file."""
    with open(path, "rb") as file:  # noqa: PTH123 - or a device's name
        return list(qdisk.users_of(file.fileno(), by_writers=by_writers))


@pytest.mark.slow
def test_an_image_that_qemu_serves(bus: Path, image: Path, tmp_path: Path) -> None:
    """QEMU is named while it has this file open; other files and other programs do not count."""
    other = tmp_path / "other"
    other.write_bytes(b"")
    with opened_by(QEMU, image) as pid, opened_by(QEMU, other), opened_by("editor", image):
        assert [f"QEMU, which serves a guest (process {pid})"] == users_of(image)
    assert [] == users_of(image)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("r", 0), ("w", 1), ("o", 1)])
def test_who_only_reads(bus: Path, image: Path, mode: str, count: int) -> None:
    """QEMU that only reads is in the way of writers only."""
    with opened_by(QEMU, image, mode):
        assert (1, count) == (len(users_of(image)), len(users_of(image, by_writers=True)))


@pytest.mark.slow
def test_a_device_by_another_node(bus: Path, image: Path, tmp_path: Path) -> None:
    """A block device is recognised by its number, whatever node is used; another device is not taken for it."""
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 20))
    node = Path("/dev/xenbackend-test-node")
    with loops.over(image) as device, loops.over(other) as unused, opened_by(QEMU, device):
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)  # noqa: PTH116 - a device's name
        try:
            assert (1, 1, 0) == (len(users_of(device)), len(users_of(node)), len(users_of(unused)))
        finally:
            node.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("inode", "count"), [("none", 1), ("wrong", 0)])
def test_what_the_kernel_says_of_inodes(
    bus: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inode: str, count: int
) -> None:
    """Before Linux 5.14 the kernel tells no inode, so each file is examined; another file system's inode differs."""
    held = image if inode == "none" else tmp_path / "other"
    held.touch()
    said = "" if inode == "none" else f"ino:\t{image.stat().st_ino}"
    text_of = qdisk.text_of
    monkeypatch.setattr(qdisk, "text_of", lambda path: re.sub(r"(?m)^ino:.*$", said, text_of(path)))
    with opened_by(QEMU, held):
        assert count == len(users_of(image))


@pytest.mark.slow
def test_a_device_of_characters_is_no_disk(bus: Path) -> None:
    """A character device such as /dev/null may have the number of a disk, but is not taken for it."""
    node = Path("/dev/xenbackend-test-ram")
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, Path("/dev/null").stat().st_rdev)
    except PermissionError:
        pytest.skip("this host lets us make no node of a device")
    try:
        fd = os.open(node, os.O_PATH)
    finally:
        node.unlink()
    with opened_by(QEMU, "/dev/null"):
        assert [] == list(qdisk.users_of(fd))
    os.close(fd)


@pytest.mark.slow
def test_what_ends_meanwhile_is_no_user(bus: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process or descriptor that vanishes during the search is skipped; the others are found."""
    names = os.listdir

    def with_gone(path: str) -> list[str]:
        return ["4194305" if path == "/proc" else "1048577", *names(path)]  # more than there can be

    with opened_by(QEMU, image) as pid, monkeypatch.context() as patched:
        patched.setattr(os, "listdir", with_gone)
        assert [f"QEMU, which serves a guest (process {pid})"] == users_of(image)


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["file", "device"])
def test_no_other_file_of_qemu_is_asked_for(
    bus: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str
) -> None:
    """Other files that QEMU has open are not touched if number or name already differ: their storage may hang."""
    other = tmp_path / "other"
    other.write_bytes(b"")
    asked: list[object] = []
    look = os.stat

    def note(path: Any, **more: Any) -> os.stat_result:
        asked.append(path)
        return look(path, **more)

    with loops.over(image) as device, opened_by(QEMU, other) as pid:
        links = Path(f"/proc/{pid}/fd")
        theirs = {str(each) for each in links.iterdir() if each.readlink() == other}
        with open(device if ours == "device" else image, "rb") as file, monkeypatch.context() as patched:  # noqa: PTH123 - as above
            patched.setattr(os, "stat", note)
            assert [] == list(qdisk.users_of(file.fileno()))

    assert 1 == len(theirs)
    assert set() == theirs.intersection(map(str, asked))


@pytest.mark.slow
def test_where_there_is_no_sign_of_qemu(bus: Path, image: Path, tmp_path: Path) -> None:
    """No process is examined if the bus shows no disk of QEMU's and libxl has no socket, or without Xen."""
    sockets = tmp_path / "sockets"
    with opened_by(QEMU, image):
        (bus / "qdisk-5-51712").rename(bus / "vbd-5-51712")
        assert [] == users_of(image)
        sockets.mkdir()
        (sockets / "qmp-libxl-5").write_text("")
        assert 1 == len(users_of(image))
        (sockets / "qmp-libxl-5").unlink()
        (bus / "vbd-5-51712").rmdir()
        bus.rmdir()
        assert [] == users_of(image)
        bus.write_text("")
        assert [] == users_of(image)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["r", "w"])
@pytest.mark.parametrize("place", ["file", "device"])
def test_a_disk_of_ours_is_refused(bus: Path, image: Path, mode: str, place: str) -> None:
    """A writer is refused beside a QEMU that reads, and a reader beside one that writes; the error names QEMU.

    That holds for the file and for a loop device over it. Two readers are allowed, and so is `share=on` in the layer.
    """
    with loops.over(image) as device, opened_by(QEMU, image, mode), closing(Reactor()) as reactor:
        ours = device if place == "device" else str(image)
        files = HostFiles(reactor)
        for read_only in (False, True):
            is_refused = not (read_only and mode == "r")
            error = pytest.raises(DriverError, match=r"in use by QEMU, which serves a guest \(process ")
            with error if is_refused else nullcontext():
                files.open(ours, read_only=read_only).close()
        files.open(ours, read_only=False, shareable=True).close()
        files.close()
