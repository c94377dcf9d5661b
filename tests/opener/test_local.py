"""Opening files in this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from xenbackend import settings_file
from xenbackend.block.mapped.parents import PARENT
from xenbackend.errors import DriverError
from xenbackend.opener import marks
from xenbackend.opener.local import LocalOpener, identity_of, is_device


@pytest.fixture
def opener() -> Iterator[LocalOpener]:
    """Return an opener without settings; it may leave nothing open."""
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
    """Return the first byte of the file that a name opens; it stays held."""
    opener.hold(str(path))
    fd, _ = opener.open(str(path), write=False)
    try:
        return os.read(fd, 1)
    finally:
        os.close(fd)


def test_what_was_found_is_what_is_opened(opener: LocalOpener, images: Path) -> None:
    """A path that an image was followed to opens the file that was found, whatever the name means by then."""
    opener.hold(str(images / "child"))
    found = opener.find(PARENT, str(images / "child"), ["base"], str(images))
    (images / "base").rename(images / "former")
    (images / "base").write_bytes(b"x")

    assert (str(images / "base"), f"parents={images}") == (found.path, found.by)
    assert b"b" == read(opener, found.path)
    opener.release(found.path)  # of `read`
    assert b"x" == read(opener, found.path)


def test_what_an_administrator_names_is_looked_up_anew(opener: LocalOpener, images: Path) -> None:
    """A name in the chain's text means the file that has it when it is opened."""
    assert b"b" == read(opener, images / "base")
    (images / "base").unlink()
    (images / "base").write_bytes(b"x")

    assert b"x" == read(opener, images / "base")


def test_errors_are_about_the_path(opener: LocalOpener, images: Path) -> None:
    """An error has the path as a person wrote it, and leaves no descriptor open."""
    with pytest.raises(OSError, match=r"\w") as caught:
        opener.hold(str(images / "gone"))
    with pytest.raises(DriverError, match="is a directory") as refused:
        opener.hold(str(images))

    assert (errno.ENOENT, str(images / "gone")) == (caught.value.errno, caught.value.filename)
    assert str(images) == refused.value.path
    for name in (images / "gone", images):
        with pytest.raises(KeyError):
            opener.descriptor(str(name))


def test_a_child_is_marked(opener: LocalOpener, images: Path) -> None:
    """A new image is marked with its parent, and that one with its data file."""
    (images / "data").write_bytes(b"d")
    for name in ("child", "base", "data"):
        opener.hold(str(images / name))
    files = {"file": str(images / "base"), "data_file": str(images / "data")}
    child = opener.descriptor(str(images / "child"))
    with pytest.raises(DriverError, match="named only by the image"):
        opener.find(PARENT, str(images / "child"), ["base"])
    assert opener.mark_child(child, files)

    assert "its mark" == opener.find(PARENT, str(images / "child"), ["base"]).by
    assert "its mark" == opener.find("data file", str(images / "base"), ["data"]).by


def test_a_child_that_cannot_be_marked(opener: LocalOpener, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file system cannot keep marks, `mark_child` returns false, and that is no error."""
    opener.hold(str(images / "base"))
    monkeypatch.setattr(marks, "PARENT", "nonsense.xenbackend.parent")
    with (images / "child").open("r+b") as file:
        assert not opener.mark_child(file.fileno(), {"file": str(images / "base")})


def test_the_settings_of_the_host(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings file is read only when an image names another file."""
    path = images / "xenbackend.toml"
    monkeypatch.setattr(settings_file, "PATH", path)
    path.write_text("parents = [")
    opener = LocalOpener()
    opener.hold(str(images / "child"))
    with pytest.raises(
        DriverError, match=r"the directories where parents may be are not known: .*xenbackend.toml: is not TOML"
    ):
        opener.find(PARENT, str(images / "child"), ["base"])
    path.write_text(f'parents = ["/none", "{images}"]\n')
    assert f"the settings' parents, {images}" == opener.find(PARENT, str(images / "child"), ["base"]).by
    path.write_text("parents = 5")
    with pytest.raises(DriverError, match="named only by the image"):
        opener.find(PARENT, str(images / "child"), ["base"])
    opener.close()


def test_what_is_closed_is_let_go_of(images: Path) -> None:
    """Each opening has its own file description. A held name is not looked up again until it is released."""
    before, path = open_descriptors(), images / "base"
    opener = LocalOpener(lambda: ())
    opener.hold(str(path))
    fd, facts = opener.open(str(path), write=True)
    os.pwrite(fd, b"y", 0)
    os.close(fd)
    path.rename(images / "former")

    assert facts.identity == opener.look(str(path)).identity == identity_of(str(images / "former"))
    assert b"y" == (images / "former").read_bytes()
    opener.release(str(path))
    assert before == open_descriptors()
    assert identity_of(str(path)) is None
    assert not is_device(str(images / "former"))
