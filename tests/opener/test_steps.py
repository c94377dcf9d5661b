"""The steps of opening a file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from xenbackend.errors import DriverError
from xenbackend.opener import steps


def test_what_is_held_is_what_is_opened(tmp_path: Path) -> None:
    """The file that was examined is opened, whatever its name means by then."""
    path = tmp_path / "image"
    path.write_bytes(b"first")
    held = steps.hold(str(path))
    path.unlink()
    path.write_bytes(b"other")
    opened = steps.reopen(held, str(path), write=False)
    found = os.read(opened, 10)
    os.close(opened)
    os.close(held)

    assert b"first" == found


@pytest.mark.parametrize(
    ("make", "what"), [(os.mkfifo, "is a pipe"), (os.mkdir, "is a directory")], ids=["pipe", "directory"]
)
def test_what_can_be_no_image_is_never_opened(tmp_path: Path, make: Callable[[str], object], what: str) -> None:
    """A file that cannot be an image is refused by its type without being opened, so that nothing waits for a pipe."""
    path = str(tmp_path / "odd")
    make(path)
    with pytest.raises(DriverError, match=what):
        steps.hold(path)


def test_a_record_is_made_for_its_owner_and_through_no_link(tmp_path: Path) -> None:
    """A record is made for its owner only, an existing file stays, and a link is refused: it could lead anywhere."""
    path = tmp_path / "record"
    held = steps.hold_record(str(path), create=True)
    os.close(held)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(DriverError, match="is not a regular file"):
        steps.hold_record(str(tmp_path / "link"), create=True)
    with pytest.raises(FileNotFoundError):
        steps.hold_record(str(tmp_path / "none"), create=False)

    assert 0o600 == stat.S_IMODE(path.stat().st_mode)


def test_an_unnamed_file_is_in_no_directory(tmp_path: Path) -> None:
    """An unnamed file can be opened through its descriptor, by its owner only, and is in no directory."""
    held = steps.hold_unnamed(str(tmp_path))
    opened = steps.reopen(held, "unnamed", write=True)
    os.write(opened, b"data")
    os.close(opened)
    opened = steps.reopen(held, "unnamed", write=False)

    assert b"data" == os.read(opened, 10)
    assert [] == list(tmp_path.iterdir())
    assert (0, 0o600) == (os.fstat(held).st_nlink, stat.S_IMODE(os.fstat(held).st_mode))
    os.close(opened)
    os.close(held)


def test_where_a_file_system_makes_none_a_name_is_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without unnamed files, such as NFS, a file's name is removed at once; it cannot be given one
    later.
    """
    plain = os.open

    def refusing(path: str, flags: int, *more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return plain(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    held = steps.hold_unnamed(str(tmp_path))
    monkeypatch.undo()

    assert [] == list(tmp_path.iterdir())
    with pytest.raises(DriverError, match="cannot name an unnamed file"):
        steps.give_name(held, str(tmp_path / "name"))
    os.close(held)


def test_a_name_is_given_once_and_to_no_other_file(tmp_path: Path) -> None:
    """Giving the same name again does nothing; one that is taken, or on another file system, is refused."""
    held = steps.hold_unnamed(str(tmp_path))
    path, taken = tmp_path / "kept", tmp_path / "taken"
    taken.write_bytes(b"precious")
    steps.give_name(held, str(path))
    steps.give_name(held, str(path))
    elsewhere = Path("/dev/shm/kept")
    for name, why in [(taken, "exists already"), (elsewhere, "another file system"), (path / "x", "directory")]:
        with pytest.raises(DriverError, match=why):
            steps.give_name(held, str(name))

    assert b"precious" == taken.read_bytes()
    assert path.stat().st_ino == os.fstat(held).st_ino
    os.close(held)


def test_a_name_that_nobody_made_durable_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a kill came between giving a name and making it durable, giving it again makes it durable."""
    held, path = steps.hold_unnamed(str(tmp_path)), tmp_path / "kept"
    plain, synced = os.fsync, list[int]()

    def killed(_fd: int) -> None:
        raise KeyboardInterrupt

    def noting(fd: int) -> None:
        plain(fd)
        synced.append(os.fstat(fd).st_ino)

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        steps.give_name(held, str(path))
    assert path.exists()
    monkeypatch.setattr(os, "fsync", noting)
    steps.give_name(held, str(path))

    assert [tmp_path.stat().st_ino] == synced
    assert path.stat().st_ino == os.fstat(held).st_ino
    os.close(held)


@pytest.mark.parametrize(
    ("directory", "why"),
    [("", "no directory for unnamed files is configured"), ("/nowhere", "/nowhere, the directory")],
)
def test_an_unnamed_file_needs_a_directory(directory: str, why: str) -> None:
    """Without a usable directory for unnamed files, the error names it or the setting."""
    with pytest.raises(DriverError, match=why):
        steps.hold_unnamed(directory)


def test_facts(tmp_path: Path) -> None:
    """The facts are those of the held file; the path has all links resolved."""
    (tmp_path / "image").write_bytes(bytes(100))
    (tmp_path / "link").symlink_to("image")
    held = steps.hold(str(tmp_path / "link"))
    facts = steps.look(held, str(tmp_path / "link"))
    os.close(held)

    status = (tmp_path / "image").stat()
    assert (100, False, status.st_mtime_ns) == (facts.size, facts.is_device, facts.mtime_ns)
    assert str((tmp_path / "image").resolve()) == facts.real
    assert facts.identity.startswith("file ")


def test_directories_with_links_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's directory is returned with links resolved; a name that ends with a slash is a directory, and need not
    exist.
    """
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    monkeypatch.chdir(tmp_path)
    real = str(tmp_path.resolve())
    for name in (f"{tmp_path}/link/image", f"{tmp_path}/link/", "link/image", "link/"):
        assert f"{real}/a/b" == steps.resolve(name)
    assert f"{real}/a" == steps.resolve("link/../image")
    assert real == steps.resolve("image")
    assert f"{real}/none" == steps.resolve(f"{tmp_path}/none/")


def test_errors_are_about_the_name(tmp_path: Path) -> None:
    """An error has the file's name, and not /proc/self/fd/7."""
    path = tmp_path / "image"
    path.write_bytes(b"x")
    held = steps.hold(str(path))
    with pytest.raises(OSError, match="descriptor") as caught:
        steps.reopen(held + 1000, str(path), write=True)
    os.close(held)

    assert str(path) == caught.value.filename
