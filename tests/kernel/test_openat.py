"""Tests of `xenbackend.kernel.openat`."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.kernel import openat
from xenbackend.walls.calls import MACHINES


@pytest.fixture
def top(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Return a descriptor and the path of a directory with a file two levels down, and links of every kind."""
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
    """The descriptor itself cannot be read; reopened, it is the same file, whatever its name means by then."""
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
    """No name and no link leads out of the directory, and no link is followed at all."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"\w") as caught:
        openat.open_beneath(top[0], name)

    assert code == caught.value.errno
    assert before == len(os.listdir("/proc/self/fd"))


def test_magic_links_lead_nowhere(top: tuple[int, Path]) -> None:
    """Files that another process has open cannot be reached beneath /proc, even if that directory is allowed."""
    proc = openat.open_place("/proc")
    with pytest.raises(OSError, match=r"\w") as caught:
        openat.open_beneath(proc, f"{os.getpid()}/fd/{top[0]}")
    os.close(proc)

    assert errno.ELOOP == caught.value.errno


# linux/filter.h, linux/seccomp.h: 437, which is openat2 everywhere (asm-generic/unistd.h), is refused with ENOSYS.
_WITHOUT_OPENAT2 = """
import errno, os, struct, sys
from xenbackend.kernel import openat, privileges, seccomp
from xenbackend.walls.filter import ALLOW, EQUAL, LOAD, REFUSE, RETURN

rows = [(LOAD, 0, 0, 0), (EQUAL, 0, 1, 437), (RETURN, 0, 0, REFUSE | errno.ENOSYS), (RETURN, 0, 0, ALLOW)]
privileges.refuse_new_privileges()
seccomp.load(b"".join(struct.pack("=HBBI", *row) for row in rows))
fd = openat.open_beneath(openat.open_place(sys.argv[1]), "sub/file")
sys.stdout.buffer.write(os.read(openat.reopen(fd, os.O_RDONLY), 100))
"""


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="no filter is known for this machine")
def test_it_works_where_systemd_hides_openat2(top: tuple[int, Path]) -> None:
    """If openat2 is answered with ENOSYS, as by systemd for RestrictSUIDSGID, files are still opened."""
    command = [sys.executable, "-c", _WITHOUT_OPENAT2, str(top[1])]
    done = subprocess.run(command, capture_output=True, check=False, cwd=Path(__file__).parents[2], timeout=60)

    assert (b"inside", b"") == (done.stdout, done.stderr)


@pytest.mark.parametrize("exchanged", ["sub", "sub/file"])
def test_what_is_exchanged_meanwhile_leads_nowhere(top: tuple[int, Path], exchanged: str) -> None:
    """While a name is repeatedly exchanged for a link that leads out, the original file is opened, or none."""
    directory, path = top
    (path.parent / "file").write_bytes(b"outside")
    (path / exchanged).rename(path / "kept")
    (path / exchanged).symlink_to(".." if exchanged == "sub" else "../../secret")
    got, stop = set(), threading.Event()
    flipper = threading.Thread(target=_flip, args=(path / "kept", path / exchanged, stop))
    flipper.start()
    try:
        for number in range(1_000_000):
            if number >= 2000 and len(got) > 1:  # on a busy machine both take turns seldom
                break
            try:
                fd = openat.open_beneath(directory, "sub/file")
            except OSError as error:
                got.add(error.errno)
                continue
            opened = openat.reopen(fd, os.O_RDONLY)
            got.add(os.read(opened, 100))
            os.close(opened)
            os.close(fd)
    finally:
        stop.set()
        flipper.join()

    assert {b"inside", errno.ELOOP} == got


def _flip(one: Path, other: Path, stop: threading.Event) -> None:
    """Exchange two names until told to stop (renameat2(2), RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    while not stop.is_set():
        assert 0 == libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2)
