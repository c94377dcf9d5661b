"""Tests of `xenbackend.kernel.claims`; worker/test_in_use.py has the rules of who excludes whom."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from descriptors import open_descriptors

from tests import loops
from xenbackend.kernel import claims


@contextmanager
def node(path: str | Path) -> Iterator[int]:
    """Open a descriptor that only names a file, while the block lasts."""
    fd = os.open(path, os.O_PATH)
    try:
        yield fd
    finally:
        os.close(fd)


def test_files_are_not_claimed(tmp_path: Path) -> None:
    """Files are opened without a claim, by any number of writers, with the flags that were asked for."""
    (tmp_path / "file").touch()
    with node(tmp_path / "file") as named:
        before = open_descriptors()
        fds = [claims.open_medium(named, read_only=each) for each in (False, False, True)]
        modes = [os.pwrite(fd, b"x", 0) if number < 2 else os.pread(fd, 1, 0) for number, fd in enumerate(fds)]
        assert [1, 1, b"x"] == modes
        for fd in fds:
            os.close(fd)
        assert before == open_descriptors()


def test_the_file_is_the_one_that_was_named(tmp_path: Path) -> None:
    """The file behind the descriptor is opened, whatever its name means now."""
    (tmp_path / "file").write_bytes(b"old")
    with node(tmp_path / "file") as named:
        (tmp_path / "file").rename(tmp_path / "other")
        (tmp_path / "file").write_bytes(b"new")
        fd = claims.open_medium(named, read_only=True)
        assert b"old" == os.read(fd, 3)
        os.close(fd)


def test_a_claim_within_one_process(tmp_path: Path) -> None:
    """A second claim is refused even within one process, and a refusal leaves no descriptor open."""
    with loops.loop(tmp_path / "disk", 1 << 20, sector_size=512) as (device, _), node(device) as named:
        writer = claims.open_medium(named, read_only=False)
        before = open_descriptors()
        for read_only in (False, True):
            with pytest.raises(OSError, match="busy") as caught:
                claims.open_medium(named, read_only=read_only)
            assert errno.EBUSY == caught.value.errno
            os.close(claims.open_medium(named, read_only=read_only, claims=False))
        assert before == open_descriptors()
        os.close(writer)
        reader = claims.open_medium(named, read_only=True)
        assert not claims.is_in_use(reader)
        os.close(claims.open_medium(named, read_only=False))
        os.close(reader)


def test_who_cannot_write_does_not_disturb_readers(tmp_path: Path) -> None:
    """A claim on a device that can only be read does not exclude a reader."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    with loops.over(path, "--read-only") as device, node(device) as named:
        claim = os.open(device, os.O_RDONLY | os.O_EXCL)
        reader = claims.open_medium(named, read_only=True)
        assert claims.is_in_use(reader)
        assert not claims.is_in_use(reader, by_writers=True)
        os.close(reader)
        os.close(claim)
