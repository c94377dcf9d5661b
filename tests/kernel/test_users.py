"""Tests of `xenbackend.kernel.users`: who uses an image is named without waiting for anything."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import loops
from xenbackend.kernel import users
from xenbackend.kernel.process import rename

_LOCKS = """
import fcntl, sys
from pathlib import Path
from xenbackend.kernel import locks, process
if sys.argv[2]: process.rename(sys.argv[2])
file = Path(sys.argv[1]).open("r+b")
{}
print(1, flush=True)
input()
"""
WAYS = {
    "flock": "fcntl.flock(file, fcntl.LOCK_SH)",
    "bytes": "locks.take(file.fileno(), locks.SHARED_READ); fcntl.flock(file, fcntl.LOCK_UN)",
    "both": "locks.take(file.fileno(), locks.READ)",
}


@contextmanager
def locked(path: Path, way: str, name: str = "") -> Iterator[int]:
    """Let another process hold a lock, and yield its number."""
    command = [sys.executable, "-c", _LOCKS.format(WAYS[way]), path, name]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.stdin.write(b"\n")
            process.stdin.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_process_with_a_lock(image: Path, way: str) -> None:
    """A process with any kind of lock is named by its shortened command and its number while it has the lock."""
    with image.open("rb") as file:
        with locked(image, way) as pid:
            said = users.users_of(file.fileno())
            assert said.startswith(f"{Path(sys.executable).name} -c \\nimport fcntl, sys")
            assert said.endswith(f"... (process {pid})")
            assert len(said) < 100
        assert "" == users.users_of(file.fileno())


@pytest.mark.slow
def test_a_worker_is_called_by_its_disk(image: Path) -> None:
    """A worker is named by its disk."""
    with image.open("rb") as file, locked(image, "both", f"{users.WORKER}12345/xvdaa") as pid:
        assert f"the disk 12345/xvdaa (process {pid})" == users.users_of(file.fileno())


def test_neither_ourselves_nor_who_only_has_it_open(image: Path) -> None:
    """Our own lock does not count, nor does a process that has the file open without a lock."""
    with image.open("rb") as file, image.open("rb") as other:
        fcntl.flock(file, fcntl.LOCK_SH)
        with subprocess.Popen(["sleep", "60"], stdin=other) as reader:
            assert "" == users.users_of(file.fileno())
            reader.kill()


def test_a_file_that_is_gone(image: Path) -> None:
    """For a file that is gone, or an invalid descriptor, nobody is named and nothing is raised."""
    with image.open("rb") as file:
        image.unlink()
        assert "" == users.users_of(file.fileno())
    assert "" == users.users_of(-1)


def test_users_of_a_device(tmp_path: Path) -> None:
    """A mount of the disk or of a partition is named by its place; a process that has a device open is named."""
    with loops.loop(tmp_path / "disk", 16 << 20, sector_size=512) as (device, _), loops.partition(device) as part:
        place = tmp_path / "two words"
        disk_fd, part_fd = os.open(device, os.O_RDONLY), os.open(part, os.O_RDONLY)
        try:
            with loops.mounted(part, place):
                assert f"a file system mounted at {place}" == users.users_of(part_fd)
                assert f"{part}, a file system mounted at {place}" == users.users_of(disk_fd)
            with subprocess.Popen(["sleep", "60"], stdin=disk_fd) as sleeper:
                assert f"sleep 60 (process {sleeper.pid})" in users.users_of(disk_fd)
                sleeper.kill()
        finally:
            os.close(disk_fd)
            os.close(part_fd)


def test_a_name_is_a_processes_own() -> None:
    """`rename` sets the name that ps shows, up to 15 bytes of it."""
    before = Path("/proc/self/comm").read_text().rstrip("\n")
    try:
        rename("xb 12345/xvdaaaaaaaaa")
        assert "xb 12345/xvdaaa\n" == Path("/proc/self/comm").read_text()
    finally:
        rename(before)
