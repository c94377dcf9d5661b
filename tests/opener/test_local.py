"""Files opened in this process, by the same rules."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from xenbackend.block.mapped.parents import PARENT
from xenbackend.errors import DriverError
from xenbackend.opener.local import LocalOpener, identity_of, is_device


def test_nothing_but_what_was_asked_for_stays_open(tmp_path: Path) -> None:
    """Each opening has its own file description, and what was held for it is let go of."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * 512)
    before = open_descriptors()
    opener = LocalOpener()
    fd, facts = opener.open(str(path), write=True)
    assert len(before) + 1 == len(open_descriptors())
    os.pwrite(fd, b"y", 0)
    os.close(fd)

    assert opener.look(str(path)).identity == facts.identity == identity_of(str(path))
    assert b"y" == path.read_bytes()[:1]
    assert before == open_descriptors()
    assert identity_of(str(tmp_path / "none")) is None
    assert not is_device(str(path))


def test_an_image_is_followed_no_further_than_in_a_worker(tmp_path: Path) -> None:
    """What it names must be where it is, whoever looks."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "base").touch()
    (tmp_path / "secret").touch()
    image = str(tmp_path / "images" / "child")

    assert str(tmp_path / "images" / "base") == LocalOpener().find(PARENT, image, ["base"])
    with pytest.raises(DriverError, match="outside of"):
        LocalOpener().find(PARENT, image, ["../secret"])
