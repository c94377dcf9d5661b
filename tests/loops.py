"""Loop devices, with sectors as large as a test wants; without such devices the test is skipped.

Must not leave a device behind, however the test ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

_BLKPG, _ADD, _DELETE, _RESIZE = 0x1269, 1, 2, 3


@contextmanager
def alone() -> Iterator[None]:
    """Keep other tests from taking a device that is free for a moment."""
    with Path("/dev/loop-control").open("rb") as control:
        fcntl.flock(control, fcntl.LOCK_EX)
        yield


def give(device: str, path: Path, *options: str) -> None:
    """Set up a device that is in use over another file; options are those of losetup."""
    with alone():
        subprocess.run(["losetup", "--detach", device], check=True)
        subprocess.run(["losetup", *options, device, path], check=True)


@contextmanager
def loop(path: Path, size: int, *, sector_size: int) -> Iterator[tuple[str, Path]]:
    """Set up a device over a new file, and yield the paths of both. Sizes in bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    arguments = ["losetup", "--find", "--show", f"--sector-size={sector_size}", path]
    done = _find(arguments)
    if done.returncode:
        pytest.skip(f"no loop device for us: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device, path
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def over(path: Path | str, *options: str) -> Iterator[str]:
    """Set up a device over an existing file, and yield its path; options are those of losetup."""
    done = _find(["losetup", "--find", "--show", *options, path])
    if done.returncode:
        pytest.skip(f"no loop device for us: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(device: str, place: Path, *options: str) -> Iterator[None]:
    """Make an ext4 on a device, and mount it within this context."""
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    with remounted(device, place, *options):
        yield


@contextmanager
def remounted(device: str, place: Path, *options: str) -> Iterator[None]:
    """Mount a device as it is within this context."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, device, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def bound(path: Path, place: Path) -> Iterator[Path]:
    """Mount a file on another one, which is made, within this context, and yield its second name."""
    place.touch()
    subprocess.run(["mount", "--bind", path, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # an opener may hold the file for a while


@contextmanager
def partition(device: str, number: int = 1) -> Iterator[str]:
    """Add a partition of 4 MiB to a device, without a table: linux/blkpg.h. The first one is at 1 MiB."""
    _ask(device, _ADD, number, 4 << 20)
    try:
        yield f"{device}p{number}"
    finally:
        _ask(device, _DELETE, number, 4 << 20)


def grow_partition(device: str, size: int) -> None:
    """Enlarge the first partition, even while it is open."""
    _ask(device, _RESIZE, 1, size)


def _ask(device: str, what: int, number: int, size: int) -> None:
    start = (1 << 20) + (number - 1) * (4 << 20)
    values = ctypes.create_string_buffer(struct.pack("=qqi64s64s4x", start, size, number, b"", b""))
    with Path(device).open("r+b", buffering=0) as disk:
        call = struct.pack("iiiP", what, 0, len(values), ctypes.addressof(values))
        fcntl.ioctl(disk, _BLKPG, call)


def _find(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    if not shutil.which("losetup"):
        pytest.skip("losetup is not installed (Debian: mount)")
    with alone() if Path("/dev/loop-control").exists() else nullcontext():
        return subprocess.run(command, capture_output=True, text=True, check=False)
