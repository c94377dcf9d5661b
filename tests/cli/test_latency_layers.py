"""`xenbackend latency --layers`: which layer takes the time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.answering import Request, answering, working
from xenbackend.cli.latency_layers import lines
from xenbackend.cli.main import main


def measure(tmp_path: Path, *words: str) -> tuple[int, list[Request]]:
    """Run the command, and return its exit status and what was asked."""
    with answering(tmp_path / "x", working) as control:
        status = main(["latency", "mail/xvda", "--layers", "--socket", control.path, *words])
        return status, control.asked


def test_each_layer_has_a_line_for_each_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the guest's end down; one that had nothing to do is there, too. A guest's name will do."""
    status, asked = measure(tmp_path, "--interval", "1")
    printed = capsys.readouterr().out.splitlines()

    assert (0, [{"verb": "measure", "vbd": "mail/xvda", "seconds": 1.0}]) == (status, asked)
    assert "mail/xvda  log:|aio:/img" == printed[0]
    assert ["log:", "read", "2", "4", "KiB", "150", "us", "131", "us", "262", "us"] == printed[2].split()
    assert ["aio:/img", "-", "0"] == printed[3].split()[:3]
    assert "measured for 1 s" in printed[4]


def test_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each operation has its histogram, and the order its number."""
    measure(tmp_path, "--json", "--interval", "1")
    values = json.loads(capsys.readouterr().out)

    assert (17, "mail/xvda", 1.0) == (values["order"], values["vbd"], values["seconds"])
    first, second = values["layers"]
    assert {"layer": "aio:/img", "operations": {}} == second
    read = first["operations"]["read"]
    assert (2, 8192, 150_000, 1 << 17) == (read["requests"], read["bytes"], read["mean_ns"], read["bounds_ns"]["p50"])
    assert [1, 1] == [each["count"] for each in read["buckets"]]


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was is not known by layer, and there is no picture of it: nothing is ordered."""
    status, asked = measure(tmp_path, "--total")

    assert (2, []) == (status, asked)
    assert "leave out --total and --plot" in capsys.readouterr().err


def test_no_text_of_a_chain_moves_a_cursor() -> None:
    """It is printed so that it can be read."""
    measured = {"chain": "aio:/\x1b[2J", "seconds": 1.0, "layers": [{"layer": "aio:/\x1b[2J", "operations": {}}]}

    assert not any("\x1b" in line for line in lines("5/xvda", measured))
