"""Answers to questions about disks and orders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.errors import ConfigError
from xenbackend.protocol.answers import Answer
from xenbackend.supervisor.service import questions
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.service.questions import Questions

BROKEN = 2  # the domain whose disk cannot be described


@pytest.fixture
def ledger() -> Ledger:
    """A ledger without orders."""
    return Ledger(Keeper({}), lambda: 100.0)


@pytest.fixture
def bugs() -> list[Exception]:
    """The exceptions that the loop was told of."""
    return []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, bugs: list[Exception], ledger: Ledger) -> Questions:
    """The questions of a service with three disks."""

    def describe(vbd: Any, guest: str, _meanings: object, *, now: float, braked_s: float) -> dict[str, Any]:
        if vbd.path.frontend_domid == BROKEN:
            raise RuntimeError("broken")
        return {"vbd": vbd.path, "guest": guest, "now": now, "braked_s": braked_s}

    monkeypatch.setattr(questions, "describe", describe)
    vbds = {
        domid: SimpleNamespace(path=SimpleNamespace(frontend_domid=domid), is_forgotten=False) for domid in (3, 2, 1)
    }
    registry: Any = SimpleNamespace(
        vbds=vbds, names_of=lambda domids: {each: f"guest-{each}" for each in domids}, braked_s=lambda _: 0.5
    )
    loop: Any = SimpleNamespace(bug=bugs.append, now=lambda: 7.0)
    looks: Any = SimpleNamespace(close=lambda: None)
    return Questions(registry, looks, ledger, loop)


def answers_of(handler: Any, request: dict[str, Any]) -> list[Answer]:
    """Return all answers to a request."""
    found: list[Answer] = []
    handler(request, None, found.append)
    return found


def test_a_fault_hides_one_disk(asked: Questions, bugs: list[Exception]) -> None:
    """Disks are listed in order. One that cannot be described is left out, and that is reported with its name."""
    [answer] = answers_of(asked.status, {})

    assert [("guest-1", 7.0), ("guest-3", 7.0)] == [(each["guest"], each["now"]) for each in answer.data]
    assert ["broken"] == [str(each) for each in bugs]
    assert "was described" in bugs[0].__notes__[0]


def test_orders_are_told_by_number(asked: Questions, ledger: Ledger) -> None:
    """The answer has all orders, or the one with the given number. A number that is not remembered, or not a number, is
    refused.
    """
    number = ledger.open("pause", "5/xvda", {"uid": 0, "pid": 12, "command": "xenbackend"}, {})
    every, one = answers_of(asked.orders, {})[0].data, answers_of(asked.orders, {"order": number})[0].data

    assert ["pause"] == [each["verb"] for each in every] == [each["verb"] for each in one]
    for other in (number + 1, str(number), True):
        with pytest.raises(ConfigError, match="there is no order"):
            asked.orders({"order": other}, Any, lambda _: None)
