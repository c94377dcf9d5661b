"""The command status on a terminal."""

from __future__ import annotations

import argparse
import io
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.answering import DISK, answering, moved, typed_disk, typed_service, working
from xenbackend.cli import pictures, status_table
from xenbackend.cli.main import main
from xenbackend.cli.pictures import Picture
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code


def disk(**changes: Any) -> dict[str, Any]:
    """Return a description of a disk, with some of it changed."""
    return {**deepcopy(DISK), **changes}


OTHER = disk(vbd="6/xvdb", node="vbd/6/51728", domid=6, guest="web", device="xvdb", chain="ram:1G")


def test_a_table_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 80 columns only the chain is broken, nothing moves the cursor, and the service has its line."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(pictures, "SAMPLE_S", 0.0)
    disks = [
        disk(chain="[bold]aio:/img/\x1b[2J" + 40 * "x", error="the worker was ended by SIGKILL", restarts=2),
        {
            **OTHER,
            "needs_upgrade": True,
            "braked_s": 8.0,
            "worker_version": "0.0.9",
            "no_walls": {"landlock": "no"},
            "needs": ["network"],
        },
    ]

    def answer(request: dict[str, Any]) -> Answer:
        return Answer(Code.OK, disks) if request["verb"] == "status" else working(request)

    with answering(tmp_path / "x", answer) as control:
        assert 0 == main(["status", "--socket", control.path])
    out = capsys.readouterr().out

    assert "\x1b[2J" not in out
    for part in ("5/xvda", "mail", "Connected", "0 B/s", r"\x1b[2J", "[bold]", "restarts of its worker: 2", "6/xvdb"):
        assert part in out
    assert "the worker was ended by SIGKILL" in " ".join(out.split())
    assert "6/xvdb: its worker runs 0.0.9" in out
    assert "6/xvdb: its guest writes to xenstore all the time, so it is only looked at every 8 s" in " ".join(
        out.split()
    )
    assert "6/xvdb: its worker is not behind these walls: landlock" in out
    assert "6/xvdb: its drivers need, and have: network" in out
    assert "service 0.1.0, process 11, up" in out
    assert "2 disks; 1 of 2 need upgrade: xenbackend upgrade" in " ".join(out.split())


def picture(*disks: dict[str, Any], at: float = 0.0) -> Picture:
    """Return what the service said at a certain time."""
    return Picture(typed_service(), [typed_disk(each) for each in disks], at)


def shown(before: Picture, after: Picture, height: int = 100) -> str:
    """Return what `status --watch` shows on a terminal of this height."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=100, height=height)
    console.print(status_table.fitting(console, argparse.Namespace(sort="disk"), before, after))
    return stream.getvalue()


def test_the_first_picture_has_no_rates() -> None:
    """A disk that was not seen before has a dash for each rate, not a zero."""
    first = picture(disk())
    later = picture(moved(disk(), reads=100), OTHER, at=2.0)

    assert "0/s" not in shown(first, first)
    assert "rates follow with the next refresh" in shown(first, first)
    assert "50/s" in shown(first, later)
    assert ["-", "-"] == [word for word in shown(first, later).splitlines()[4].split() if word == "-"][:2]


@pytest.mark.parametrize("error", ["", "it is so\n" * 3])
def test_a_picture_is_no_higher_than_the_terminal(error: str) -> None:
    """Disks that do not fit are left out together with their notes, and counted."""
    all_ = picture(*(disk(vbd=f"{number}/xvda", node=f"vbd/{number}/51712", domid=number, error=error, paused=True)
                     for number in range(20)))  # fmt: skip
    lines = shown(all_, all_, 24).splitlines()

    assert len(lines) <= 24
    assert "0/xvda" in lines[2]
    assert re.search(r"; 1\d more disks do not fit here: see --sort", " ".join(" ".join(lines).split()))
    assert "19/xvda" in shown(all_, all_, 500)
