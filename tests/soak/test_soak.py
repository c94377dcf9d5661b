"""A small soak: what `make soak` does with 128 disks for an hour; and what ends one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.soak import __main__ as soak
from tests.soak.__main__ import SoakError, main, run

SHORT_H = 1 / 3600


@pytest.mark.slow
def test_disks_of_several_guests_are_served_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each disk, of whatever guest and format, has answers; they are verified, and nothing grows."""
    monkeypatch.setattr(soak, "_EACH", 4)
    figures = run(SHORT_H, 6, 1)

    assert 6 == figures["disks"]
    assert figures["of the disk with the fewest"] > 0
    assert figures["sectors verified"] >= 6 * 2048


@pytest.mark.slow
def test_a_disk_that_holds_something_else_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that reads what it has not written says so, and there are no figures."""
    monkeypatch.setattr(soak, "_CHAINS", ("aio:{raw}",))
    usual = soak.create

    def create(kind: str, file: str, size: int) -> None:
        usual(kind, file, size)
        Path(file).write_bytes(b"not zero" * (size // 8))

    monkeypatch.setattr(soak, "create", create)
    with pytest.raises(SoakError, match="guest 11: WrongData: sector"):
        run(SHORT_H, 1, 1)


def test_what_grows_or_goes_ends_it() -> None:
    """More descriptors than a client's, or another worker than before, are no figure."""
    before = {"service": 50, "11/xvda 7": 12}
    soak._compare(before, {"service": 53, "11/xvda 7": 12})
    for after in ({"service": 54, "11/xvda 7": 12}, {"service": 50, "11/xvda 7": 16}):
        with pytest.raises(SoakError, match="descriptors"):
            soak._compare(before, after)
    with pytest.raises(SoakError, match="a worker has ended that nobody killed"):
        soak._compare(before, {"service": 50, "11/xvda 8": 12})


def test_fewer_disks_are_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of as many disks as the scoreboard asks for leaves its hours; one of fewer leaves what was there."""
    file = tmp_path / "soak.json"
    runs: list[int] = []

    def pretend(hours: float, disks: int, _seed: int) -> dict[str, Any]:
        runs.append(disks)
        if hours < 1:
            raise SoakError("something")
        return {soak._HOURS: hours}

    monkeypatch.setattr(soak, "run", pretend)
    assert 0 == main(["--hours", "1.5", "--json", str(file)])
    assert 1.5 == json.loads(file.read_text())["hours"]
    assert 0 == main(["--hours", "9", "--disks", "127", "--json", str(file)])
    assert 1.5 == json.loads(file.read_text())["hours"]
    assert 1 == main(["--hours", "0.5", "--json", str(file)])
    assert not file.exists()
    assert [128, 127, 128] == runs
