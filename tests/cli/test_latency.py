"""`xenbackend latency`: a histogram of the requests between two looks."""

from __future__ import annotations

import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.answering import DISK, answering, typed_disk, working
from xenbackend.cli import latency
from xenbackend.cli.histogram import Histogram
from xenbackend.cli.main import main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code


def timed(**buckets: int) -> dict[str, Any]:
    """Return a disk with the given numbers of samples in buckets such as `at17`, each sample of 100 us."""
    known = deepcopy(DISK)
    for name, count in buckets.items():
        known["latency_histogram"][int(name.removeprefix("at"))] = count
        known["counters"]["latency_ns"] += count * 100_000
    return known


def test_it_is_of_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples from before the first look are left out; bounds are those of buckets; a guest's name is accepted."""
    looks = [timed(at17=1000, at30=5), timed(at17=1090, at18=9, at20=1, at30=5)]
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def answer(request: dict[str, Any]) -> Answer:
        return Answer(Code.OK, [looks.pop(0)]) if request["verb"] == "status" else working(request)

    with answering(tmp_path / "x", answer) as control:
        assert 0 == main(["latency", "mail/xvda", "--interval", "3", "--json", "--socket", control.path])
    values = json.loads(capsys.readouterr().out)

    assert [3.0] == slept
    assert (100, 100_000, "5/xvda") == (values["samples"], values["mean_ns"], values["vbd"])
    assert {"p50": 1 << 17, "p90": 1 << 17, "p99": 1 << 18, "p99.9": 1 << 20} == values["bounds_ns"]
    assert [(1 << 17, 90), (1 << 18, 9), (1 << 19, 0), (1 << 20, 1)] == [
        tuple(each.values()) for each in values["buckets"]
    ]


def test_without_requests_there_is_nothing_to_divide() -> None:
    """An idle disk has no mean and no bounds."""
    nothing = Histogram((0,) * 48, 0, 2.0)

    assert (None, None, 0, []) == (nothing.mean_ns, nothing.bound_ns(0.5), nothing.samples, list(nothing.filled()))
    assert {"p50": None, "p90": None, "p99": None, "p99.9": None} == latency.values(typed_disk(), nothing)["bounds_ns"]


@pytest.mark.parametrize("words", [["9/xvda"], ["5/xvda", "--plot", "/nonexistent/x.png", "--total"]])
def test_mistakes(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown disk, or a picture that cannot be written or drawn, ends with status 2."""
    with answering(tmp_path / "x", working) as control:
        assert 2 == main(["latency", *words, "--socket", control.path])
    said = capsys.readouterr().err

    assert any(part in said for part in ("there is no disk 9/xvda", "cannot be written", "--plot needs matplotlib"))
