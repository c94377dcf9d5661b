"""Tests of `xenbackend.kernel.locks`: who may use an image beside whom, among our processes and QEMU's."""

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from tests import qemu
from xenbackend.kernel import locks

ALL = {"read": locks.READ, "write": locks.WRITE, "shared read": locks.SHARED_READ, "shared write": locks.SHARED_WRITE}
TOGETHER = {
    frozenset({"read"}), frozenset({"read", "shared read"}), frozenset({"shared read"}),
    frozenset({"shared read", "shared write"}), frozenset({"shared write"}),
}  # fmt: skip

PAIRS = list(product(ALL, ALL))
Open = Callable[[], int]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a raw image of 1 MiB."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def opened(image: Path) -> Iterator[Open]:
    """Return a function that opens the image, each time with a file description of its own."""
    fds: list[int] = []

    def open_once() -> int:
        fds.append(os.open(image, os.O_RDWR))
        return fds[-1]

    yield open_once
    for fd in fds:
        os.close(fd)


def held(path: Path) -> list[tuple[int, int]]:
    """Return the first and last byte of each byte lock on a file, as the kernel lists them."""
    place = f":{path.stat().st_ino}"
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sorted((int(row[6]), int(row[7])) for row in rows if row[1] == "OFDLCK" and row[5].endswith(place))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_who_may_have_an_image_beside_whom(opened: Open, first: str, second: str) -> None:
    """Readers go with readers, sharers with sharers, and a writer with nobody, in any order."""
    assert locks.take(opened(), ALL[first])
    assert (frozenset({first, second}) in TOGETHER) == locks.take(opened(), ALL[second])


@pytest.mark.parametrize(("name", "options"), [("write", []), ("read", ["-r"])])
def test_the_bytes_are_those_of_qemu(image: Path, opened: Open, name: str, options: list[str]) -> None:
    """We lock the same bytes as QEMU does for an image in a format that it writes or reads."""
    foreign = image.with_name("foreign")
    qemu.qemu_img("create", "-q", "-f", "qcow2", foreign, "1M")
    with qemu.held_open("qcow2", foreign, *options):
        expected = held(foreign)
    assert expected
    assert locks.take(opened(), ALL[name])

    assert expected == held(image)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_byte_locks_alone_keep_apart_what_must_be(image: Path, first: str, second: str) -> None:
    """Byte locks alone, as QEMU has them, refuse the same pairs, except `qemu-img -U`, which reads anyway."""
    with image.open("r+b") as one, image.open("r+b") as other:
        assert locks.take(one.fileno(), ALL[first])
        fcntl.flock(one, fcntl.LOCK_UN)

        together = TOGETHER | {frozenset({"shared read", "write"})}
        assert (frozenset({first, second}) in together) == locks.take(other.fileno(), ALL[second])


def test_who_is_refused_leaves_no_byte(image: Path, opened: Open) -> None:
    """A failed try leaves none of its own byte locks, and the other's as they were."""
    first = opened()
    assert locks.take(first, locks.WRITE)
    before = held(image)
    fcntl.flock(first, fcntl.LOCK_UN)
    assert not locks.take(opened(), locks.READ)

    assert before == held(image)


@pytest.mark.parametrize("name", ALL)
def test_a_lock_on_the_whole_file_is_no_word_of_qemus(image: Path, opened: Open, name: str) -> None:
    """A lock on the whole file, as NFS makes of a flock, is not taken for QEMU's locks."""
    script = "import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.lockf(f, fcntl.LOCK_SH); print(1,flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script, image], stdin=-1, stdout=-1) as other:
        assert other.stdout
        other.stdout.readline()

        assert locks.take(opened(), ALL[name])
        other.communicate(b"\n")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_byte_locks(opened: Open, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Without byte locks the flock alone decides."""

    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert locks.take(opened(), locks.WRITE)
    assert not locks.take(opened(), locks.READ)


def test_another_error_of_a_lock_is_one(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that mean "no such locks" are ignored."""

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        locks.take(opened(), locks.WRITE)


def test_locks_last_as_long_as_the_last_copy(image: Path) -> None:
    """The byte locks end with the last copy of the descriptor, not with the first one that is closed."""
    fd = os.open(image, os.O_RDWR)
    assert locks.take(fd, locks.WRITE)
    copy = os.dup(fd)
    os.close(fd)
    assert [(100, 101), (103, 103), (201, 201), (203, 203)] == held(image)
    os.close(copy)
    assert [] == held(image)


def test_the_kernels_words() -> None:
    """`struct flock` has 32 bytes on a 64-bit host."""
    assert struct.calcsize("@hhqqi4x") == 32
