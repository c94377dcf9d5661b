"""Opening files in one's own process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend import settings_file
from xenbackend.block.mapped.parents import PARENT
from xenbackend.errors import DriverError
from xenbackend.kernel.process import OpenFile
from xenbackend.opener import marks
from xenbackend.opener.local import LocalOpener


@pytest.fixture
def opener() -> Iterator[LocalOpener]:
    """Return an opener without settings, and see that it lets go of everything."""
    before = sorted(os.listdir("/proc/self/fd"))
    opener = LocalOpener(lambda: ())
    yield opener
    opener.close()
    assert before == sorted(os.listdir("/proc/self/fd"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a directory with two images."""
    (tmp_path / "child").write_bytes(b"c")
    (tmp_path / "base").write_bytes(b"b")
    return tmp_path


def read(opener: LocalOpener, path: Path | str) -> bytes:
    """Return the first byte of what a name opens."""
    fd = opener.open(str(path), os.O_RDONLY)
    try:
        return os.read(fd, 1)
    finally:
        os.close(fd)


def test_what_was_found_is_what_is_opened(opener: LocalOpener, images: Path) -> None:
    """A path to which an image led opens that very file, whatever the name means by then."""
    os.close(opener.open(str(images / "child"), os.O_RDONLY))
    found = opener.find(PARENT, str(images / "child"), ["base"], str(images))
    (images / "base").rename(images / "former")
    (images / "base").write_bytes(b"x")

    assert (str(images / "base"), f"parents={images}") == (found.path, found.by)
    assert b"b" == read(opener, found.path)
    opener.release(found.path)  # of `read`
    assert b"x" == read(opener, found.path)


def test_what_an_administrator_names_is_looked_up_anew(opener: LocalOpener, images: Path) -> None:
    """A name of the chain means what it means when it is opened."""
    assert b"b" == read(opener, images / "base")
    (images / "base").unlink()
    (images / "base").write_bytes(b"x")

    assert b"x" == read(opener, images / "base")


def test_errors_are_about_the_path(opener: LocalOpener, images: Path) -> None:
    """What cannot be opened is named as a person named it, and leaves no descriptor."""
    for name, code, flags in (("gone", errno.ENOENT, os.O_RDONLY), (".", errno.EISDIR, os.O_RDWR)):
        with pytest.raises(OSError, match=r"\w") as caught:
            opener.open(str(images / name), flags)
        assert (code, str(images / name)) == (caught.value.errno, caught.value.filename)
        with pytest.raises(KeyError):
            opener.descriptor(str(images / name))


def test_a_child_is_marked(opener: LocalOpener, images: Path) -> None:
    """A new image over one that is open is marked with it, and that one with the file that has its data."""
    (images / "data").write_bytes(b"d")
    for name in ("child", "base", "data"):
        os.close(opener.open(str(images / name), os.O_RDONLY))
    files = {"file": str(images / "base"), "data_file": str(images / "data")}
    child = opener.descriptor(str(images / "child"))
    with pytest.raises(DriverError, match="named by the image alone"):
        opener.find(PARENT, str(images / "child"), ["base"])
    assert opener.mark_child(child, files)

    assert "its mark" == opener.find(PARENT, str(images / "child"), ["base"]).by
    assert "its mark" == opener.find("data file", str(images / "base"), ["data"]).by


def test_a_child_that_cannot_be_marked(opener: LocalOpener, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no such attributes, that is the answer, and no error."""
    os.close(opener.open(str(images / "base"), os.O_RDONLY))
    monkeypatch.setattr(marks, "PARENT", "nonsense.xenbackend.parent")
    with (images / "child").open("r+b") as file:
        assert not opener.mark_child(file.fileno(), {"file": str(images / "base")})


@pytest.mark.parametrize("is_on_btrfs", [False, True])
def test_what_is_in_service_is_marked(images: Path, *, is_on_btrfs: bool) -> None:
    """A file that a disk of the last release has open may be had, and is marked: it stays so when that has ended."""
    status = (images / "base").stat()
    known = OpenFile(str(images / "base"), status.st_dev + is_on_btrfs, status.st_ino)
    (images / "mid").write_bytes(b"m")
    opener = LocalOpener(lambda: (), [known])
    for name in ("child", "mid"):
        os.close(opener.open(str(images / name), os.O_RDONLY))
    with pytest.raises(DriverError, match="named by the image alone"):
        opener.find(PARENT, str(images / "child"), ["mid"])
    assert "the disk in service" == opener.find(PARENT, str(images / "child"), ["base"]).by
    assert "the disk in service" == opener.find("extent", str(images / "mid"), ["base"]).by
    assert "its mark" == opener.find(PARENT, str(images / "child"), ["base"]).by
    opener.close()


def test_a_number_alone_is_not_a_file_in_service(images: Path) -> None:
    """The inode's number counts on its own file system, or at its own place; each file system has such a number."""
    status = (images / "base").stat()
    other = LocalOpener(lambda: (), [OpenFile(f"{images}/x", status.st_dev + 1, status.st_ino),
                                     OpenFile(f"{images}/base", status.st_dev, status.st_ino + 1)])  # fmt: skip
    os.close(other.open(str(images / "child"), os.O_RDONLY))
    with pytest.raises(DriverError, match="named by the image alone"):
        other.find(PARENT, str(images / "child"), ["base"])
    other.close()


def test_the_settings_of_the_host(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directories in the settings file are asked for when an image names another file, and not before."""
    path = images / "xenbackend.toml"
    monkeypatch.setattr(settings_file, "PATH", path)
    path.write_text("parents = [")
    opener = LocalOpener()
    os.close(opener.open(str(images / "child"), os.O_RDONLY))
    with pytest.raises(DriverError, match=r"where parents may be cannot be known: .*xenbackend.toml: is not TOML"):
        opener.find(PARENT, str(images / "child"), ["base"])
    path.write_text(f'parents = ["/none", "{images}"]\n')
    assert f"the settings' parents, {images}" == opener.find(PARENT, str(images / "child"), ["base"]).by
    path.write_text("parents = 5")
    with pytest.raises(DriverError, match="named by the image alone"):
        opener.find(PARENT, str(images / "child"), ["base"])
    opener.close()
