"""`xenbackend stop`; `upgrade` is tried beside the other commands for disks in service."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.answering import answering, working
from xenbackend.cli import waiting
from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine
from xenbackend.protocol import client
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.rig.frontend import Wishes

WAITS = [{"vbd": f"5/xvd{letter}", "for": "xenstore, which must be told"} for letter in "abcde"]


@pytest.mark.parametrize("waits", [WAITS, None])
def test_stop_says_what_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, waits: list[Any] | None
) -> None:
    """On a terminal, `stop` shows the seconds and the first of the disks that the service waits for, with the reason;
    an older service tells none.
    """
    monkeypatch.setattr(client, "TICK_S", 0.01)
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    asked = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if request["verb"] == "ping":
            asked.set()
            return Answer(Code.OK, {} if waits is None else {"waits": waits})
        asked.wait(10)
        threading.Event().wait(0.3)  # long enough for the progress line to be drawn
        return working(request)

    with answering(tmp_path / "x", answer) as control:
        assert 0 == main(["stop", "--socket", control.path])
    shown = capsys.readouterr().err

    assert "stop: 0 s" in shown
    assert (waits is not None) == ("it waits for 5/xvda: xenstore, which must be told; 5/xvdb" in shown)
    assert (waits is not None) == ("2 more" in shown)
    assert "xvde" not in shown


@pytest.mark.parametrize("is_json", [True, False])
def test_a_stop_that_nobody_waits_for_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, is_json: bool
) -> None:
    """With --timeout the command reports what the service still waits for, in JSON too."""
    late = Answer(Code.UNDER_WAY, {"pid": 11, "waits": WAITS[:1]}, "it is still under way", 17)
    with answering(tmp_path / "x", lambda _: late) as control:
        status = main(["stop", "--timeout", "0", "--socket", control.path, *["--json"] * is_json])
    captured = capsys.readouterr()

    assert 75 == status
    if is_json:
        assert WAITS[:1] == json.loads(captured.out)["waits"]
    else:
        assert "the service waits for 5/xvda: xenstore, which must be told\n" in captured.err


@pytest.mark.slow
def test_stop_ends_everything_in_order(tmp_path: Path) -> None:
    """After `stop` the disk has no worker and nothing of the guest is mapped; the next service continues serving it."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{image}"), Wishes(persistent=True))
        frontend.write(0, b"a" * 4096)
        status = main(["stop", "--socket", machine.control])
        assert machine.service is not None
        ended = machine.service.wait(20)
        held = machine.xen.held()
        machine.start_service()
        frontend.write(8, b"b" * 4096)

        assert (0, 0) == (status, ended)
        assert 0 == held["mappings"]
        frontend.close()
