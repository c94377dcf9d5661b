"""Marks on images: what they hold, and how files are recognised by them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import places
from tests.loops import loop
from xenbackend.kernel import identity
from xenbackend.opener import marks
from xenbackend.opener.marks import Marked, describe, mark_files, mark_parents, obstacle, read

Held = Callable[[Path], int]


@pytest.fixture(params=[*places.OUTSIDE[:2]], ids=["memory", "disk"])
def home(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return a directory with an image and a parent, in memory and on a disk in turn."""
    with places.directory(request.param) as path:
        (path / "child").write_bytes(b"c")
        (path / "base").write_bytes(b"b")
        yield path


@pytest.fixture
def held() -> Iterator[Held]:
    """Return a function that opens files with O_PATH until the test ends."""
    with ExitStack() as stack:

        def hold(path: Path) -> int:
            fd = os.open(path, os.O_PATH)
            stack.callback(os.close, fd)
            return fd

        yield hold


def test_a_parent_is_known_by_any_name(home: Path, held: Held) -> None:
    """A mark stays on its image when that is renamed, and recognises the parent when that is."""
    assert mark_parents(held(home / "child"), [describe(held(home / "base"), f"{home}/base")])
    (home / "base").rename(home / "moved")
    (home / "child").rename(home / "grown-up")
    (marked,) = read(held(home / "grown-up")).parents

    assert marked.is_of(held(home / "moved"))
    assert not marked.is_of(held(home / "grown-up"))


def test_another_file_of_that_name_is_another_one(home: Path, held: Held) -> None:
    """A file that takes the parent's name is not taken for the parent, even if it gets its inode number."""
    mark_parents(held(home / "child"), [describe(held(home / "base"), f"{home}/base")])
    (marked,) = read(held(home / "child")).parents
    number = (home / "base").stat().st_ino
    seen = set()
    for _ in range(5):
        (home / "base").unlink()
        (home / "base").write_bytes(b"b")
        seen.add((home / "base").stat().st_ino == number)
        fd = os.open(home / "base", os.O_PATH)
        assert not marked.is_of(fd)
        os.close(fd)


def test_the_number_of_the_file_system_may_change(home: Path, held: Held) -> None:
    """A file is recognised after the host was restarted, even if its file system has another number then."""
    base = held(home / "base")
    noted = describe(base, "")
    found = identity.identify(base)
    assert isinstance(found, identity.FileIdentity)
    if not (found.handle and noted.born):
        pytest.skip("this file system has no handles, or no times of birth")
    other = identity.FileIdentity(found.device + 1, found.inode, found.handle, found.born)

    assert Marked(identity.to_text(other), noted.born).is_of(base)
    assert not Marked(identity.to_text(other), noted.born + 1).is_of(base)
    assert not Marked(identity.to_text(other)).is_of(base)


def test_a_mark_can_be_changed_and_taken_away(home: Path, held: Held) -> None:
    """A mark for parents can be replaced or removed; the mark for files with data is another one."""
    child, base = held(home / "child"), describe(held(home / "base"), "")
    other = Marked(device="/dev/vg/base")
    mark_files(child, [base])
    for parents in ([base], [base, other], [other], [], []):
        assert mark_parents(child, parents)
        assert parents == read(child).parents
        assert [base] == read(child).files


def test_an_owner_cannot_make_a_mark(home: Path, held: Held) -> None:
    """Attributes user.*, which a file's owner may write, are no marks, and only root can write one."""
    child = held(home / "child")
    mark_parents(child, [describe(held(home / "base"), "")])
    value = os.getxattr(home / "child", marks.PARENT)
    os.removexattr(home / "child", marks.PARENT)
    for name in ("user.xenbackend.parent", "user.trusted.xenbackend.parent"):
        try:
            os.setxattr(home / "child", name, value)
        except OSError:
            pytest.skip("this file system has no attributes user.*")
    assert [] == read(child).parents

    os.chown(home, 65534, 65534)
    os.chown(home / "child", 65534, 65534)
    pid = os.fork()
    if not pid:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            os.setxattr(home / "child", marks.PARENT, value)
        except PermissionError:
            os._exit(0)
        finally:
            os._exit(1)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("copy", [shutil.copyfile, shutil.copy2, shutil.move])
def test_a_copy_has_no_mark(home: Path, held: Held, copy: Callable[[Path, Path], object]) -> None:
    """A copy, which is another file, has no mark, unless attributes are copied too; a file that is moved within its
    file system keeps it.
    """
    mark_parents(held(home / "child"), [describe(held(home / "base"), "")])
    has_attributes = copy is shutil.copy2  # it copies attributes, as cp -a and rsync -X do for root
    copy(home / "child", home / "copy")
    found = read(held(home / "copy")).parents

    assert (has_attributes or copy is shutil.move) == bool(found)


_NOT_MARKS = [
    b"", b"{", b"[]", b"\xff", b'{"version": 2}', b'{"version": 1, "files": 7}',
    b'{"version": 1, "files": [{"identity": "x"}]}', b'{"version": 1, "files": [{"x": 1}]}',
]  # fmt: skip


@pytest.mark.parametrize("value", _NOT_MARKS)
def test_what_is_no_mark(home: Path, held: Held, value: bytes) -> None:
    """A mark that cannot be read marks nothing, and the problem is reported."""
    os.setxattr(home / "child", marks.PARENT, value)
    found = read(held(home / "child"))

    assert ([], []) == (found.parents, found.files)
    assert found.problem


def test_where_no_mark_can_be(held: Held, tmp_path: Path) -> None:
    """On a file system without such attributes, or on a block device, no mark is made, and the obstacle is named."""
    assert "" == obstacle(held(tmp_path))
    place = held(Path("/proc/self/status"))
    assert "its file system cannot keep marks (trusted.* attributes)" == obstacle(place)
    assert not mark_parents(place, [Marked(device="/dev/x")])
    assert ([], "") == (read(place).parents, read(place).problem)


def test_a_device_is_known_by_the_name_that_was_written(tmp_path: Path, held: Held) -> None:
    """A device is recognised by the name that the administrator wrote, since device numbers are reused; a file never
    is.
    """
    with loop(tmp_path / "a", 1 << 20, sector_size=512) as (device, file), ExitStack() as stack:
        other, _ = stack.enter_context(loop(tmp_path / "b", 1 << 20, sector_size=512))
        (tmp_path / "name").symlink_to(device)
        marked = describe(held(Path(device)), f"{tmp_path}/name")
        assert Marked(device=f"{tmp_path}/name") == marked
        assert marked.is_of(held(Path(device)))
        assert not marked.is_of(held(Path(other)))
        assert not marked.is_of(held(file))
        assert not describe(held(file), "").is_of(held(Path(device)))
        (tmp_path / "name").unlink()
        (tmp_path / "name").symlink_to(other)
        assert marked.is_of(held(Path(other)))
