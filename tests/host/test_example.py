"""The example of a settings file."""

from __future__ import annotations

import re
from pathlib import Path

from xenbackend.host.example import example
from xenbackend.supervisor.service.settings import Settings, load


def test_the_example_changes_nothing(tmp_path: Path) -> None:
    """The example, as installed, changes no default."""
    path = tmp_path / "x.toml"
    path.write_text(example())

    assert Settings() == load(path, {})


def test_each_setting_is_there_with_its_default(tmp_path: Path) -> None:
    """With the # before each setting removed the file has every setting with its default."""
    path = tmp_path / "x.toml"
    path.write_text(re.sub(r"^#(?=\w+ = )", "", example(), flags=re.MULTILINE))
    names = re.findall(r"^(\w+) = ", path.read_text(), re.MULTILINE)

    assert Settings() == load(path, {})
    assert {*Settings.__slots__, *Settings().limits.__slots__} - {"limits"} == set(names)
