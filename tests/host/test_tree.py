"""Files below a root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xenbackend.errors import ConfigError
from xenbackend.host.files import Item
from xenbackend.host.tree import Tree


def test_a_file_is_born_whole(tmp_path: Path) -> None:
    """A file appears with its contents and mode whatever the umask, in directories open to all, and no draft stays."""
    former = os.umask(0o077)
    try:
        Tree(tmp_path).put(Item("/a/b/file", b"text", 0o755))
    finally:
        os.umask(former)

    assert (b"text", 0o755) == ((tmp_path / "a/b/file").read_bytes(), (tmp_path / "a/b/file").stat().st_mode & 0o777)
    assert 0o755 == (tmp_path / "a/b").stat().st_mode & 0o777
    assert ["file"] == [each.name for each in (tmp_path / "a/b").iterdir()]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    """If the last step fails, the former file is unchanged and no draft stays."""
    (tmp_path / "file").mkdir()
    (tmp_path / "file/inner").touch()
    with pytest.raises(OSError, match="file"):
        Tree(tmp_path).put(Item("/file", b"text"))

    assert ["file"] == [each.name for each in tmp_path.iterdir()]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    """A link is replaced by the item; the file that it leads to is not changed."""
    (tmp_path / "other").write_text("other's")
    (tmp_path / "file").symlink_to("other")
    tree = Tree(tmp_path)
    tree.put(Item("/file", b"ours"))
    tree.put(Item("/link", link="file"))

    assert ("other's", "ours") == ((tmp_path / "other").read_text(), (tmp_path / "file").read_text())
    assert "link:file" == tree.fingerprint("/link")


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    """A directory that is a link out of the root is refused, so that an image's files are never put on this host."""
    (tmp_path / "image").mkdir()
    (tmp_path / "image/etc").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="leads out of"):
        Tree(tmp_path / "image").put(Item("/etc/file"))

    assert ["image"] == [each.name for each in tmp_path.iterdir()]


def test_an_item_is_there_when_content_and_mode_are(tmp_path: Path) -> None:
    """An item counts as present if contents and mode are right; the mode of a settings file is the admin's."""
    tree, script, config = Tree(tmp_path), Item("/script", b"x", 0o755), Item("/config", b"x", is_config=True)
    for item in (script, config):
        tree.put(item)
        assert tree.has(item)
        (tmp_path / item.path[1:]).chmod(0o600)

    assert (False, True) == (tree.has(script), tree.has(config))


def test_only_empty_directories_are_removed(tmp_path: Path) -> None:
    """A directory that was made is removed with those below it, unless it contains somebody else's file."""
    tree = Tree(tmp_path)
    missing = tree.missing_directories(["/a/b/file", "/c/file"])
    tree.put(Item("/a/b/file"))
    tree.put(Item("/c/file"))
    tree.remove("/a/b/file")
    tree.remove_directories(missing)

    assert ["/a", "/a/b", "/c"] == missing
    assert ["c"] == [each.name for each in tmp_path.iterdir()]


def test_a_root_is_a_directory(tmp_path: Path) -> None:
    """A missing root is the operator's mistake."""
    with pytest.raises(ConfigError, match="is not a directory"):
        Tree(tmp_path / "none")
