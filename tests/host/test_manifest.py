"""The manifest of what was installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.errors import ConfigError
from xenbackend.host import manifest
from xenbackend.host.manifest import Manifest
from xenbackend.host.tree import Tree


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """A saved manifest is loaded as it was; a missing one means that nothing was installed."""
    tree = Tree(tmp_path)
    installed = Manifest({"/etc/x": "sha256:00", "/etc/y": "link:x"}, ["/etc"])
    assert Manifest() == manifest.load(tree)
    manifest.save(tree, installed)

    assert installed == manifest.load(tree)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"frob": 1}', "\0"])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    """A manifest that cannot be read is refused with its path, and not taken for a missing one."""
    place = tmp_path / manifest.PATH[1:]
    place.parent.mkdir(parents=True)
    place.write_text(text)
    with pytest.raises(ConfigError, match=r"installed\.json: is damaged"):
        manifest.load(Tree(tmp_path))
