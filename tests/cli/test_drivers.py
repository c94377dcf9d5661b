"""The command drivers."""

from __future__ import annotations

import argparse
import json

import pytest

from xenbackend.block import drivers as table
from xenbackend.cli import drivers
from xenbackend.errors import ConfigError


def run(*words: str) -> int:
    """Run the command as main does."""
    parser = argparse.ArgumentParser()
    drivers.register(parser.add_subparsers())
    arguments = parser.parse_args(["drivers", *words])
    return int(arguments.run(arguments))


def test_the_list_has_every_driver(capsys: pytest.CaptureFixture[str]) -> None:
    """Every driver is listed, and formats that are known but have no driver are named."""
    assert run() == 0
    output = capsys.readouterr().out
    for name in (*table.driver_names(), "qed"):
        assert name in output


def test_the_list_is_there_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json each driver comes with its kind and options."""
    assert run("--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["drivers"]}
    assert ("source", "filter") == (rows["aio"]["kind"], rows["delay"]["kind"])
    assert ["file", "cache", "sector", "share"] == [option["name"] for option in rows["aio"]["options"]]


def test_a_manual_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """With a name the driver's manual is printed, including its table of options."""
    assert run("fault") == 0
    output = capsys.readouterr().out
    assert "Synopsis:" in output
    assert "errno: errno, default EIO" in output


def test_a_driver_that_is_not_there_is_an_error() -> None:
    """An unknown driver's name is an error with a sentence that main prints."""
    with pytest.raises(ConfigError, match="did you mean aio"):
        run("aoi")
    with pytest.raises(ConfigError, match="did you mean aio"):
        run("aoi", "--json")
