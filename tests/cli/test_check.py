"""The command check."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.helpers_block import image
from xenbackend.cli import check
from xenbackend.errors import ChainError, DriverError


def run(*words: str) -> int:
    """Run the command as main does."""
    parser = argparse.ArgumentParser()
    check.register(parser.add_subparsers())
    arguments = parser.parse_args(["check", *words])
    return int(arguments.run(arguments))


def test_a_chain_is_explained_layer_by_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The table names each layer with its size, abilities and what it reported."""
    path = image(tmp_path / "i")

    assert run(f"delay:read=5ms|aio:{path},cache=on") == 0
    output = capsys.readouterr().out
    for word in ("delay:read=5ms", "1 MiB", "read,", "write,", "flush", "page"):
        assert word in output


def test_json_has_the_facts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With --json there is one object, whose layers stand top first; --read-only is seen in it."""
    path = image(tmp_path / "img")

    assert run("--json", "--read-only", f"tap2:delay:|aio:{path}") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chain"] == f"delay:|aio:{path}"
    assert ["delay:", f"aio:{path}"] == [layer["text"] for layer in report["layers"]]
    assert [(1 << 20, True)] * 2 == [(layer["size"], layer["read_only"]) for layer in report["layers"]]
    assert "mode" in report["layers"][1]["facts"]


def test_what_is_wrong_is_raised_for_the_operator(tmp_path: Path) -> None:
    """A bad chain and an image that cannot be opened end in the errors that main prints."""
    with pytest.raises(ChainError):
        run("dealy:|null:")
    with pytest.raises(DriverError, match="there is no file or device"):
        run(f"aio:{tmp_path}/none")


def test_an_image_is_free_after_a_check(tmp_path: Path) -> None:
    """A check leaves no lock behind, and not a byte altered."""
    path = image(tmp_path / "img")
    path.write_bytes(b"kept" * 256)
    for _ in range(2):
        assert run("--json", f"aio:{path}") == 0

    assert path.read_bytes() == b"kept" * 256
