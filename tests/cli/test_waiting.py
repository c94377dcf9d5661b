"""An order is waited for, even over a restart of the service, and the operator sees that."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.answering import CHAIN, DISK, ENTRY, answering, working
from xenbackend.cli import waiting
from xenbackend.cli.main import main
from xenbackend.client import following
from xenbackend.protocol import client
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

OPEN = {**ENTRY, "ended": None, "code": "under-way"}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_waiting_is_shown_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    """An order that takes long is shown on standard error if that is a terminal, and never on standard output."""
    monkeypatch.setattr(client, "TICK_S", 0.01)
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    if not is_terminal:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # importing it now fails

    def answer(request: dict[str, Any]) -> Answer:
        threading.Event().wait(0.05)  # the order takes this long
        return working(request)

    with answering(tmp_path / "x", answer) as control:
        main(["pause", "5/xvda", "--socket", control.path])
    captured = capsys.readouterr()

    assert ("5/xvda: pause: 0 s" in captured.err) == is_terminal
    assert captured.out.startswith("5/xvda is paused")


LEFT = Answer(Code.UNDER_WAY, CHAIN, "the service is replaced", 17)
AWAY = Answer(Code.UNREACHABLE, sentence="it is away")
OTHER = {**ENTRY, "number": 18, "token": "another"}


@pytest.mark.parametrize(
    ("first", "later", "status", "said"),
    [
        (LEFT, [AWAY, [OPEN], [ENTRY]], 0, "5/xvda is served by log:|aio:/img; update"),
        (LEFT, [[ENTRY | {"code": "failed", "error": "killed"}]], 1, "5/xvda is served by log:|aio:/img\n"),
        (LEFT, [[]], 75, "5/xvda is served by log:|aio:/img\n"),
        (LEFT, [AWAY], 75, "5/xvda is served by log:|aio:/img\n"),
        (b"", [AWAY, [OTHER], [OTHER, ENTRY]], 75, ""),
        (b"", [[ENTRY, OTHER]], 0, "5/xvda is served by log:|aio:/img; update"),
        (b"", [AWAY, [OPEN, OTHER], [ENTRY, OTHER]], 0, "5/xvda is served by log:|aio:/img; update"),
    ],
)
def test_an_order_is_waited_for_over_a_restart_of_the_service(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    first: Answer | bytes,
    later: list[Any],
    status: int,
    said: str,
) -> None:
    """The next service tells how the order ended; if it cannot, or none comes, the order is not reported as failed.

    A service that was killed gave no order number: the order is found by the token that it was given with.
    """
    monkeypatch.setattr(following, "LOOK_S", 0.0)
    monkeypatch.setattr(following, "RETURN_S", 0.0 if later == [AWAY] else 60.0)
    looks = iter(later)
    given = ""

    def answer(request: dict[str, Any]) -> Answer | bytes:
        nonlocal given
        if request["verb"] == "orders":
            found = next(looks, later[-1])
            if isinstance(found, Answer):
                return found
            return Answer(Code.OK, [{**each, "token": each["token"] or given} for each in found])
        if request["verb"] == "ping":
            return working(request)
        given = request.get("token", given)
        return first if request["verb"] == "set" else Answer(Code.OK, [{**DISK, **CHAIN, "layers": []}])

    with answering(tmp_path / "x", answer) as control:
        assert status == main(["set", "5/xvda", "aio:/new", "--socket", control.path])

    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("more", [["--timeout", "9"], ["--dry-run"]])
def test_what_is_not_waited_for_over_a_restart(tmp_path: Path, more: list[str]) -> None:
    """An order with a time limit is not followed over a restart, nor is a dry run, which no service records."""

    def answer(request: dict[str, Any]) -> Answer:
        return working(request) if request["verb"] == "ping" else LEFT

    with answering(tmp_path / "x", answer) as control:
        assert 75 == main(["set", "5/xvda", "aio:/new", *more, "--socket", control.path])

    assert ["ping", "set"] == [each["verb"] for each in control.asked]
