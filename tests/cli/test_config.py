"""`xenbackend config show`: the settings that a service would use."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from xenbackend.cli.main import main
from xenbackend.supervisor.service.settings import Settings, load

FILE = 'poll_us = 60\nparents = ["/a \\"b\\""]\n[limits]\nmax_queues = 2\n'


def test_what_is_shown_means_what_the_file_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is TOML with every setting; settings that the file does not contain are marked as defaults."""
    path = tmp_path / "x.toml"
    path.write_text(FILE)
    assert 0 == main(["config", "show", "--config", str(path)])
    shown = capsys.readouterr().out
    (tmp_path / "shown.toml").write_text(shown)

    assert load(path, {}) == load(tmp_path / "shown.toml", {})
    assert asdict(Settings()).keys() == tomllib.loads(shown).keys()
    assert {"poll_us", "parents", "max_queues"} == {
        line.split()[0] for line in shown.splitlines() if " = " in line and not line.endswith("# default")
    }


def test_defaults_are_those_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """`--defaults` shows the built-in defaults, whatever file this host has; --json prints them as an object."""
    assert 0 == main(["config", "show", "--defaults"])
    shown = capsys.readouterr().out
    assert 0 == main(["config", "show", "--defaults", "--json"])

    assert asdict(Settings()) == tomllib.loads(shown) == json.loads(capsys.readouterr().out)["settings"]


def test_a_file_that_cannot_be_used_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the file has a mistake, no setting is printed."""
    path = tmp_path / "x.toml"
    path.write_text("poll_us = 60\nfrob = 1\n")

    assert 2 == main(["config", "show", "--config", str(path)])
    assert ("", True) == ((said := capsys.readouterr()).out, f"{path}:2: there is no setting frob" in said.err)
