"""Tests of `xenbackend.kernel.qdisk` on a bus made of files, with processes of QEMU's name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

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
fd = os.open(sys.argv[2], os.O_RDONLY if sys.argv[3] == "r" else os.O_RDWR)
print(1, flush=True)
input()
"""
QEMU = "xen-qemu-system-i386"  # Debian's; the kernel keeps 15 characters


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the bus, where the kernel shows a disk of QEMU's."""
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
    """Have a process of this name hold a file open, without a lock; give its number."""
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
    """Return who uses a file."""
    with open(path, "rb") as file:  # noqa: PTH123 - or a device's name
        return list(qdisk.users_of(file.fileno(), by_writers=by_writers))


@pytest.mark.slow
def test_an_image_that_qemu_serves(bus: Path, image: Path, tmp_path: Path) -> None:
    """QEMU is named for as long as it has this very file open; another file and another program do not count."""
    other = tmp_path / "other"
    other.write_bytes(b"")
    with opened_by(QEMU, image) as pid, opened_by(QEMU, other), opened_by("editor", image):
        assert [f"QEMU, which serves a guest (process {pid})"] == users_of(image)
    assert [] == users_of(image)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("r", 0), ("w", 1)])
def test_who_only_reads(bus: Path, image: Path, mode: str, count: int) -> None:
    """QEMU that only reads is in the way of a writer alone."""
    with opened_by(QEMU, image, mode):
        assert (1, count) == (len(users_of(image)), len(users_of(image, by_writers=True)))


@pytest.mark.slow
def test_a_device_by_another_node(bus: Path, image: Path) -> None:
    """A block device is known by its number."""
    with loops.over(image) as device, opened_by(QEMU, device):
        assert 1 == len(users_of(device))


@pytest.mark.slow
def test_where_there_is_no_sign_of_qemu(bus: Path, image: Path, tmp_path: Path) -> None:
    """Nobody is looked at where the bus shows no disk of QEMU's and there is no socket of libxl's, nor without Xen."""
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["r", "w"])
@pytest.mark.parametrize("place", ["file", "device"])
def test_a_disk_of_ours_is_refused(bus: Path, image: Path, mode: str, place: str) -> None:
    """Who writes is refused beside QEMU that reads, and who reads beside QEMU that writes, by the file and by a loop
    device over it; the error names QEMU. Two readers go together, and so does `share=on` in the layer.
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
