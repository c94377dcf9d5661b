"""Committing a child to its parent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.image_content import assert_same_for_qemu, disk_content, disk_write, ignore
from tests.qemu import qemu_io
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image.commit import commit
from xenbackend.image.create import create
from xenbackend.image.names import Image, find_image, image_of_file
from xenbackend.image.session import Session
from xenbackend.units import PAGE

Make = Callable[[str], Image]
MIB = 1 << 20
PAIRS = [("vhd", "vhd"), ("vhd", "raw"), ("qcow2", "qcow2"), ("qcow2", "raw"), ("qcow2", "vhd"), ("qcow", "qcow")]


@pytest.fixture
def family(made: Make, raw: Path, tmp_path: Path) -> Callable[[str, str], tuple[Image, Image, bytes]]:
    """Return a function that makes a child with data of its own, its parent, and the content of the child."""

    def make(child_format: str, parent_format: str) -> tuple[Image, Image, bytes]:
        parent = image_of_file("raw", str(raw)) if parent_format == "raw" else made(parent_format)
        child = create(child_format, f"{tmp_path}/child", None, parent=parent)
        chance = Random(2)
        disk_write(child.text, {512: b"c" * 512, 70000 // 512 * 512: bytes(PAGE), 4 * MIB: chance.randbytes(300 << 10)})
        return find_image(child.text), parent, disk_content(child.text)

    return make


@pytest.mark.parametrize(("child_format", "parent_format"), PAIRS)
def test_the_parent_becomes_what_the_child_was(
    family: Callable[[str, str], tuple[Image, Image, bytes]], tmp_path: Path, child_format: str, parent_format: str
) -> None:
    """The parent gets the child's content, zeros included. The child is unchanged, and a second commit does no harm."""
    child, parent, expected = family(child_format, parent_format)
    for _ in range(2):
        assert commit(child, ignore).written > 0

    assert expected == disk_content(parent.text)
    assert expected == disk_content(child.text)
    whole = tmp_path / "whole.raw"
    whole.write_bytes(expected)
    assert_same_for_qemu(Path(parent.path), parent_format, whole)


def test_zeros_of_a_child_are_written_over_data_only(
    family: Callable[[str, str], tuple[Image, Image, bytes]],
) -> None:
    """A range that the child says is zeros becomes zeros in the parent, and takes no space if it was zeros before."""
    child, parent, expected = family("qcow2", "raw")
    qemu_io(Path(child.path), "qcow2", "write -z 64k 64k", "write -z 2M 1M")
    before = Path(parent.path).stat().st_blocks
    commit(child, ignore)

    wanted = bytearray(expected)
    wanted[64 << 10 : 128 << 10] = bytes(64 << 10)
    assert wanted == disk_content(parent.text)
    assert Path(parent.path).stat().st_blocks * 512 - before * 512 < MIB


@pytest.mark.parametrize(("child_format", "parent_format"), PAIRS[:3])
def test_a_commit_that_is_stopped_can_be_done_again(
    family: Callable[[str, str], tuple[Image, Image, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    child_format: str,
    parent_format: str,
) -> None:
    """If a commit is stopped anywhere, the child reads as before, the parent is sound, and the next completes it."""
    monkeypatch.setattr("xenbackend.image.transfer.DEPTH", 1)
    child, parent, expected = family(child_format, parent_format)
    before = Path(child.path).read_bytes()
    seen: list[int] = []

    def stop(done: int, _total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(child, stop)
    assert expected == disk_content(child.text)
    assert before == Path(child.path).read_bytes()
    if parent_format == "qcow2":
        assert (0, 0) == qemu.check(Path(parent.path))

    commit(child, ignore)
    assert expected == disk_content(parent.text)


def test_progress_reaches_its_end(family: Callable[[str, str], tuple[Image, Image, bytes]]) -> None:
    """Progress begins with nothing and ends with everything."""
    seen: list[tuple[int, int]] = []
    child, _, _ = family("qcow2", "raw")
    commit(child, lambda done, total: seen.append((done, total)))

    assert [0, seen[-1][1]] == [seen[0][0], seen[-1][0]]
    assert sorted(seen) == seen


def test_what_cannot_be_committed_is_refused(made: Make, raw: Path, tmp_path: Path) -> None:
    """If there is no parent, or it is too small, the error says what to do."""
    with pytest.raises(ConfigError, match="has no parent"):
        commit(made("qcow2"), ignore)
    larger = create("qcow2", f"{tmp_path}/larger", 6 * MIB, parent=image_of_file("raw", str(raw)))
    with pytest.raises(ConfigError, match="make the parent larger first"):
        commit(find_image(larger.text), ignore)


@pytest.mark.usefixtures("no_wait_for_locks")
@pytest.mark.parametrize("user", ["child", "parent"])
def test_images_in_use_are_refused(family: Callable[[str, str], tuple[Image, Image, bytes]], user: str) -> None:
    """A child that is being written and a parent that is in use are not changed, and the error names them."""
    child, parent, _ = family("qcow2", "raw")
    before = Path(parent.path).read_bytes()
    with Session() as session:
        session.open(child.chain if user == "child" else parent.chain, read_only=user == "parent")
        used = child if user == "child" else parent
        with pytest.raises(DriverError, match=f"{used.path} is locked by another process"):
            commit(child, ignore)

    assert before == Path(parent.path).read_bytes()
