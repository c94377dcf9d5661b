"""Tests of `xenbackend.kernel.openat`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import openat


@pytest.fixture
def top(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Return a directory with a file two levels down, and links of every kind; and a descriptor of it."""
    path = tmp_path / "top"
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (path / "away").symlink_to("../secret")
    (path / "absolute").symlink_to(tmp_path / "secret")
    (path / "there").symlink_to("sub/file")
    (path / "directory").symlink_to("sub")
    fd = openat.open_place(str(path))
    yield fd, path
    os.close(fd)


def test_what_is_beneath_is_found(top: tuple[int, Path]) -> None:
    """The descriptor reads nothing itself, and what it is reopened as is that file, whatever the name means by then."""
    directory, path = top
    fd = openat.open_beneath(directory, "sub/file")
    (path / "sub" / "file").rename(path / "moved")
    (path / "sub" / "file").write_bytes(b"another")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.read(fd, 1)
    opened = openat.reopen(fd, os.O_RDONLY)

    assert b"inside" == os.read(opened, 100)
    assert str(path / "moved") == openat.path_of(fd)
    assert not os.get_inheritable(fd)
    assert not os.get_inheritable(opened)
    os.close(opened)
    os.close(fd)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../secret", errno.EXDEV),
        ("sub/../../secret", errno.EXDEV),
        ("/etc/passwd", errno.EXDEV),
        ("away", errno.ELOOP),
        ("absolute", errno.ELOOP),
        ("there", errno.ELOOP),
        ("directory/file", errno.ELOOP),
        ("gone", errno.ENOENT),
        ("sub/file/x", errno.ENOTDIR),
    ],
)
def test_nothing_leads_out(top: tuple[int, Path], name: str, code: int) -> None:
    """Neither a name nor a link leads out of the directory, and no link is followed at all."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"\w") as caught:
        openat.open_beneath(top[0], name)

    assert code == caught.value.errno
    assert before == len(os.listdir("/proc/self/fd"))


def test_magic_links_lead_nowhere(top: tuple[int, Path]) -> None:
    """What another process has open cannot be got at beneath /proc, where that was allowed as a directory."""
    proc = openat.open_place("/proc")
    with pytest.raises(OSError, match=r"\w") as caught:
        openat.open_beneath(proc, f"{os.getpid()}/fd/{top[0]}")
    os.close(proc)

    assert errno.ELOOP == caught.value.errno


def test_an_older_kernel_is_refused(top: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without openat2 is named as the reason: nothing is opened in another way, which could be raced."""
    monkeypatch.setattr(openat, "_SYS_OPENAT2", 5000)
    with pytest.raises(KernelError, match=r"by openat2 \(Linux 5.6 or later\): Function not implemented"):
        openat.open_beneath(top[0], "sub/file")
