"""Checking and repairing an image in a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import qemu
from tests.image_content import assert_same_for_qemu, leak
from tests.qcow_images import qcow2
from xenbackend.block.formats.qcow2 import DIRTY
from xenbackend.errors import DriverError
from xenbackend.image.check import CLEAN, ERRORS, LEAKS, check, repair
from xenbackend.image.names import Image, find_image
from xenbackend.image.session import Session

Make = Callable[[str], Image]


@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_a_sound_image_is_clean(made: Make, image_format: str) -> None:
    """An image that QEMU made has no fault, and a repair does not change a byte of it."""
    image = made(image_format)
    before = Path(image.path).read_bytes()

    assert CLEAN == check(image).status
    assert (CLEAN, 0) == (repair(image).status, repair(image).repaired)
    assert before == Path(image.path).read_bytes()[: len(before)]


def test_leaks_are_found_and_given_back(made: Make, raw: Path) -> None:
    """A cluster whose refcount is too high is leaked: the status is 3, the number is QEMU's, and a repair frees it."""
    image = made("qcow2")
    leak(Path(image.path), 2)
    found = check(image)

    assert (LEAKS, 2) == (found.status, found.leaks)
    assert (0, 2) == qemu.check(Path(image.path))
    assert (CLEAN, 2) == (repair(image).status, 2)
    assert (0, 0) == qemu.check(Path(image.path))
    assert_same_for_qemu(Path(image.path), "qcow2", raw)


def test_a_dirty_image_is_an_error_until_it_is_repaired(tmp_path: Path) -> None:
    """If an image says that its refcounts are out of date, a repair counts them again and removes the mark."""
    path = tmp_path / "dirty"
    path.write_bytes(qcow2(1 << 20, {1: b"d" * 4096}, incompatible=DIRTY))
    image = find_image(f"qcow2:{path}")

    assert ERRORS == check(image).status
    assert CLEAN == repair(image).status
    assert (0, 0) == qemu.check(path)


def test_broken_tables_are_not_touched(tmp_path: Path) -> None:
    """If more than refcounts is wrong, a repair is refused and changes nothing."""
    path = tmp_path / "broken"
    data = bytearray(qcow2(1 << 20, {1: b"d" * 4096}))
    l1 = int.from_bytes(data[40:48], "big")
    data[l1 : l1 + 8] = (1 << 63 | 1 << 40).to_bytes(8, "big")
    path.write_bytes(data.ljust(65536, b"\0"))
    before = path.read_bytes()
    image = find_image(f"qcow2:{path}")

    assert ERRORS == check(image).status
    with pytest.raises(DriverError, match="more than its refcounts"):
        repair(image)
    assert before == path.read_bytes()


@pytest.mark.usefixtures("no_wait_for_locks")
def test_an_image_in_use_is_refused(made: Make) -> None:
    """An image that is being written is not checked, and one that is being read is not repaired."""
    image = made("qcow2")
    with Session() as session:
        session.open(image.chain, read_only=False)
        with pytest.raises(DriverError, match="is locked by another process"):
            check(image)
    with Session() as session:
        session.open(image.chain, read_only=True)
        assert CLEAN == check(image).status
        with pytest.raises(DriverError, match="is locked by another process"):
            repair(image)


def test_what_is_no_image_is_said(tmp_path: Path) -> None:
    """For a file of another format, or a missing one, the error names the layer or the file."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))

    with pytest.raises(DriverError, match=f"qcow2:{path}: it is not a QCOW2 image"):
        check(find_image(f"qcow2:{path}"))
    with pytest.raises(DriverError, match="none: No such file"):
        check(find_image(f"vhd:{tmp_path}/none"))


@pytest.mark.slow
def test_a_killed_writer_leaves_leaks_at_most(made: Make, raw: Path) -> None:
    """After a SIGKILL in the middle of writes the image has leaks at most, and none after a repair."""
    image = made("qcow2")
    program = (
        "import os, sys; from tests.image_content import Session, parse_chain, write;"
        "session = Session(); disk = session.open(parse_chain(sys.argv[1]), read_only=False);"
        "session.do(disk, *[write(place << 20, b'k' * 65536) for place in range(5)]); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, image.text], check=False, cwd=Path(__file__).parents[2])

    assert -9 == done.returncode
    assert LEAKS == check(image).status
    assert CLEAN == repair(image).status
    assert (0, 0) == qemu.check(Path(image.path))
