"""`xenbackend latency --layers`: which layer takes the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.answering import Request, answering, working
from xenbackend.cli.columns import lines
from xenbackend.cli.latency_layers import FIGURES, parts
from xenbackend.cli.main import main
from xenbackend.client import Measured, results


def measure(tmp_path: Path, *words: str) -> tuple[int, list[Request]]:
    """Run the command, and return its exit status and the requests to the service."""
    tmp_path.mkdir(exist_ok=True)
    with answering(tmp_path / "x", working) as control:
        status = main(["latency", "mail/xvda", "--layers", "--socket", control.path, *words])
        return status, control.asked


def measured(chain: str, layers: list[dict[str, Any]]) -> Measured:
    """Return what the service answers after measuring for a second."""
    return results.done(Measured, 17, {"chain": chain, "seconds": 1.0, "layers": layers})


def test_each_layer_has_a_line_for_each_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers are listed from the guest's end down, idle ones included; a guest's name is accepted."""
    status, asked = measure(tmp_path, "--interval", "1")
    printed = capsys.readouterr().out.splitlines()

    assert (0, [{"verb": "measure", "vbd": "mail/xvda", "seconds": 1.0}]) == (status, asked)
    assert "mail/xvda  log:|aio:/img" == printed[0]
    assert ["log:", "read", "2", "4", "KiB", "150", "us", "131", "us", "262", "us"] == printed[2].split()
    assert ["aio:/img", "-", "0"] == printed[3].split()[:3]
    assert "measured for 1 s" in printed[4]


def test_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In JSON each operation has its histogram; the order has its number."""
    measure(tmp_path, "--json", "--interval", "1")
    values = json.loads(capsys.readouterr().out)

    assert (17, "mail/xvda", 1.0) == (values["order"], values["vbd"], values["seconds"])
    first, second = values["layers"]
    assert {"layer": "aio:/img", "operations": {}} == second
    read = first["operations"]["read"]
    assert (2, 8192, 150_000, 1 << 17) == (read["requests"], read["bytes"], read["mean_ns"], read["bounds_ns"]["p50"])
    assert [(1 << 17, 1), (1 << 18, 1)] == [(each["below_ns"], each["count"]) for each in read["buckets"]]


def test_one_of_somebody_else_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--end` ends a measurement without starting one, and says that no measurement is running."""
    status, asked = measure(tmp_path, "--end")
    said = capsys.readouterr().out
    measure(tmp_path / "json", "--end", "--json")

    assert (0, [{"verb": "end_measure", "vbd": "mail/xvda"}]) == (status, asked)
    assert "mail/xvda: no measurement is running\n" == said
    assert {"version": 1, "order": 17, "vbd": "mail/xvda"} == json.loads(capsys.readouterr().out)


def test_what_was_measured_for_another_interval(tmp_path: Path) -> None:
    """The interval is passed on to the worker, and the order is waited for as long as that takes."""
    status, asked = measure(tmp_path, "--interval", "2.5")

    assert (0, [{"verb": "measure", "vbd": "mail/xvda", "seconds": 2.5}]) == (status, asked)


def test_a_layer_is_named_once_and_its_figures_stand_in_columns() -> None:
    """Words are aligned left with their heading, figures right; a time of zero is shown as a time."""
    times = {"bytes": 4096, "sum_ns": 0, "buckets": {"0": 1}}
    long = {"bytes": 1 << 20, "sum_ns": 300_000, "buckets": {"17": 1000}}
    layers = [{"layer": "log:", "operations": {"read": times, "write": long}}, {"layer": "aio:/img", "operations": {}}]
    _, rows, _ = parts("5/xvda", measured("log:|aio:/img", layers))
    head, read, write, nothing = lines(rows, right=FIGURES)
    end = head.index("requests") + len("requests")

    assert [("log:", "read"), ("", "write"), ("aio:/img", "-")] == [
        (each[: head.index("operation")].strip(), each[head.index("operation") :].split()[0])
        for each in (read, write, nothing)
    ]
    assert ["1", "1000", "0"] == [each[:end].split()[-1] for each in (read, write, nothing)]
    assert {len(head)} == {len(each) for each in (read, write, nothing)}
    assert read.split()[5] == "0"


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--layers cannot be combined with --total or --plot, and --end needs --layers; no order is given."""
    status, asked = measure(tmp_path, "--total")

    assert (2, []) == (status, asked)
    assert "leave out --total and --plot" in capsys.readouterr().err
    assert 2 == main(["latency", "mail/xvda", "--end", "--socket", str(tmp_path)])
    assert "give both" in capsys.readouterr().err


def test_no_text_of_a_chain_moves_a_cursor() -> None:
    """Control characters in a chain are escaped."""
    found = measured("aio:/\x1b[2J", [{"layer": "aio:/\x1b[2J", "operations": {}}])

    assert "\x1b" not in str(parts("5/xvda", found)[:1]) + "".join(lines(parts("5/xvda", found)[1]))
