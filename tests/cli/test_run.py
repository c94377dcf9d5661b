"""The command run: arguments to settings; the service itself is tried in `tests/supervisor/test_main.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from xenbackend.cli import run
from xenbackend.cli.main import main
from xenbackend.supervisor import main as service
from xenbackend.supervisor.settings import Settings


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.register(parser.add_subparsers())
    return parser.parse_args(["run", *arguments])


def test_arguments_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given on the command line holds over the file's settings."""
    config = tmp_path / "x.toml"
    config.write_text('host = "a"\nserve = "ours"\n')
    served: list[Any] = []
    monkeypatch.setattr(service, "run", lambda settings, _: served.append(settings) or 0)
    args = _parse("--config", str(config), "--serve", "all", "--store", "/s")

    assert 0 == args.run(args)
    assert [Settings(host="a", serve="all", store="/s")] == served


def test_a_bad_file_is_the_operators_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A settings file with a mistake is exit status 2 and one sentence."""
    config = tmp_path / "x.toml"
    config.write_text("frob = 1\n")

    assert 2 == main(["run", "--config", str(config)])
    assert f"xenbackend: {config}: there is no setting frob" in capsys.readouterr().err
