"""The command status against a control socket that gives prepared answers."""

from __future__ import annotations

import json
import selectors
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xenbackend.cli.main import main
from xenbackend.supervisor.service.server import Server

VBD = {
    "vbd": "vbd/5/51712", "kind": "vbd", "domid": 5, "device": "xvda", "chain": "log:|[bold]null:1G",
    "read_only": False,
    "state": "Connected", "frontend_state": "Connected", "phase": "serving", "worker": 12, "since": 0.0, "error": "",
    "layers": [], "counters": {"reads": 7, "errors": 3}, "latency_ns": {"50%": 65536, "99%": 1048576},
}  # fmt: skip


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[str]:
    """The path of a control socket that knows one vbd."""
    selector = selectors.DefaultSelector()
    server = Server(str(tmp_path / "x"), selector, lambda _, reply: reply({"data": [VBD]}), lambda: 0.0)
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            for key, _ in selector.select(0.01):
                key.data()

    thread = threading.Thread(target=loop)
    thread.start()
    yield str(tmp_path / "x")
    is_over.set()
    thread.join()
    server.close()
    selector.close()


def test_json_is_what_the_service_said(answering: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json a script gets all that is known, unchanged."""
    assert 0 == main(["status", "--json", "--socket", answering])
    printed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)

    assert [VBD] == printed


def test_table_for_people(answering: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table shows domain, device, chain as it is written, state, worker, latency and errors."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("xenbackend.cli.status._SAMPLE_S", 0.0)
    assert 0 == main(["status", "--socket", answering])
    out = capsys.readouterr().out

    for part in ("xvda", "log:|[bold]null:1G", "Connected", "12", "0/s", "0 B/s", "65.5 us", "1.05 ms", " 3 "):
        assert part in out


def test_the_table_fits_and_is_safe(
    answering: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 80 columns no word but the chain is broken, an error stands there whole, and nothing moves the cursor."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("xenbackend.cli.status._SAMPLE_S", 0.0)
    monkeypatch.setitem(VBD, "chain", "aio:/img/\x1b[2J" + 40 * "x")
    monkeypatch.setitem(VBD, "error", "the worker was ended by SIGKILL")
    assert 0 == main(["status", "--socket", answering])
    out = capsys.readouterr().out

    assert "\x1b" not in out
    for part in ("5/xvda", "Connected", "0 B/s", "1.05 ms", r"\x1b[2J"):
        assert part in out
    assert "the worker was ended by SIGKILL" in " ".join(out.split())


def test_no_service_is_told_with_how_to_start_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing listens the operator reads how to start the service, and the exit status is 1."""
    assert 1 == main(["status", "--socket", str(tmp_path / "none")])
    assert "systemctl start xenbackend" in capsys.readouterr().err
