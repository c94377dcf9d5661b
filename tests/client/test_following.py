"""An order is waited for until it has ended, whichever service ends it; tests/cli/test_waiting.py has the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.answering import ENTRY, answering
from xenbackend.client import Client, Code, Gone, UnderWay, Unreachable, following
from xenbackend.protocol.answers import Answer

OPEN = Answer(Code.OK, [{**ENTRY, "ended": None, "code": "under-way"}])
ENDED = Answer(Code.OK, [{**ENTRY, "code": "failed", "error": "no"}])
AWAY = Answer(Code.GONE, sentence="the service is being replaced")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOOK_S", 0.0)


def wait(path: Path, answers: list[Answer], **options: Any) -> Any:
    """Wait for order 17 of a service that gives these answers, the last of them for ever."""
    left = list(answers)
    with answering(path, lambda _: left.pop(0) if len(left) > 1 else left[0]) as control:
        return Client(control.path, **options).wait(17)


def test_it_returns_how_the_order_ended(tmp_path: Path) -> None:
    """A failure is a value here, since the order may be somebody else's; a service that is replaced is waited for."""
    ticks: list[float] = []
    order = wait(tmp_path / "x", [OPEN, AWAY, OPEN, ENDED], waiting=ticks.append)

    assert (17, Code.FAILED, "no") == (order.number, order.code, order.error)
    assert len(ticks) >= 3


def test_it_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    """Then the outcome says which order it is."""
    with pytest.raises(UnderWay, match="order 17") as caught:
        wait(tmp_path / "x", [OPEN], timeout_s=0.05)

    assert 17 == caught.value.order


def test_a_service_that_does_not_come_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever for one that has gone, in order or not."""
    monkeypatch.setattr(following, "RETURN_S", 0.02)
    with pytest.raises(Gone):
        wait(tmp_path / "x", [OPEN, AWAY])
    with pytest.raises(Unreachable):
        Client(str(tmp_path / "none")).wait(17)
