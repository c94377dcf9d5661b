"""Tests of `xenbackend.block.mapped.parents`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from xenbackend.block.mapped.parents import find_parent, parent_ref
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError
from xenbackend.opener.local import LocalOpener


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a directory with an image, and another one beside it with a parent."""
    for name in ("images/child", "images/deep/base", "images/base", "elsewhere/base"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def test_the_first_name_that_exists(images: Path) -> None:
    """Names are relative to the image's directory, and the first that exists is taken."""
    child = str(images / "child")

    assert str(images / "base") == find_parent(LocalOpener(), child, ["gone", "./base", "deep/base"])
    assert str(images / "deep/base") == find_parent(LocalOpener(), child, [str(images / "deep/base"), "base"])


def test_a_relative_image(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is named relative to the working directory finds its parent too."""
    monkeypatch.chdir(images)

    assert str(images / "base") == find_parent(LocalOpener(), "child", ["base"])


@pytest.mark.parametrize("name", ["../elsewhere/base", "{outside}/elsewhere/base", "link", "/dev/null", "/etc/passwd"])
def test_a_parent_elsewhere_is_refused(images: Path, name: str) -> None:
    """R18: what lies outside of the image's directory is refused, by whatever name, and the way out named."""
    (images / "link").symlink_to("../elsewhere/base")
    with pytest.raises(DriverError, match=r"outside of .*; if that is right, say parents=DIRECTORY") as caught:
        find_parent(LocalOpener(), str(images / "child"), [name.format(outside=images.parent)])

    assert errno.EACCES == caught.value.errno


def test_an_operator_may_name_the_directory(images: Path) -> None:
    """With a directory named, links and names may lead anywhere in it, and nowhere else, not even beside the image."""
    (images / "link").symlink_to("../elsewhere/base")
    child, elsewhere = str(images / "child"), str(images.parent / "elsewhere")

    assert str(images / "link") == find_parent(LocalOpener(), child, ["link"], elsewhere)
    with pytest.raises(DriverError, match="outside"):
        find_parent(LocalOpener(), child, ["base"], elsewhere)
    assert str(images / "base") == find_parent(LocalOpener(), child, ["base"], "/")


def test_a_parent_that_is_gone(images: Path) -> None:
    """Where no name exists the sentence has all of them, and nothing in them moves the operator's cursor."""
    with pytest.raises(DriverError, match=r"it says 'gone', '\\x1b\[2Jx'; put the parent beside the image") as caught:
        find_parent(LocalOpener(), str(images / "child"), ["gone", "\x1b[2Jx"])
    assert errno.ENOENT == caught.value.errno
    with pytest.raises(DriverError, match="nothing that is a name"):
        find_parent(LocalOpener(), str(images / "child"), [])


@pytest.mark.parametrize("name", ["a|b", "a,b", r"a\b", "aio:x", " "])
def test_a_parent_is_one_layer(name: str) -> None:
    """Whatever characters its path has, a parent is written as one layer with that file; empty options are left out."""
    text = parent_ref("vhd", f"/img/{name}", parents="/a,b", cache="").text
    (layer,) = parse_chain(text).layers

    assert (f"/img/{name}", "/a,b", False) == (layer.options.file, layer.options.parents, layer.options.cache)
    assert os.fspath(layer.options.file) == f"/img/{name}"
