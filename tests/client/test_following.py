"""An order is waited for until it has ended, whichever service ends it; tests/cli/test_waiting.py has the commands."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.answering import DISK, ENTRY, LAYER, answering
from xenbackend.client import Client, Code, Failed, Gone, UnderWay, Unreachable, following
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


@pytest.mark.parametrize("away", [AWAY, Answer(Code.UNREACHABLE, sentence="nobody listens")])
def test_it_waits_for_a_service_since_that_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: Answer) -> None:
    """However long the order has been under way by then."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def sleep(_: float) -> None:
        clock.now += following.RETURN_S * 2 / 3

    clock.sleep = sleep
    monkeypatch.setattr(following, "time", clock)

    heard: list[float] = []
    assert 17 == wait(tmp_path / "x", [OPEN, OPEN, OPEN, away, ENDED], waiting=heard.append).number
    assert clock.now > 2 * following.RETURN_S
    assert [each * following.RETURN_S * 2 / 3 for each in range(1, 5)] == pytest.approx(heard)  # since it began


@pytest.mark.parametrize(
    ("entry", "is_ours"),
    [
        ({}, True),
        ({"began": 1e9}, False),
        ({"vbd": "6/xvda"}, False),
        ({"who": {**ENTRY["who"], "pid": 1}}, False),
        ({"verb": "pause"}, False),
    ],
)
@pytest.mark.parametrize("name", ["5/xvda", "mail/xvda"])
def test_only_the_order_that_was_given_is_taken_for_it(
    tmp_path: Path, entry: dict[str, Any], name: str, *, is_ours: bool
) -> None:
    """A program gives many orders: where a killed service told no number, none of an earlier one is the answer.

    Nor is one for another disk. Else it would be told that its order was done, which nobody has heard of.
    """
    found = {**ENTRY, "verb": "resize", "began": time.time() + 9, "who": {**ENTRY["who"], "pid": os.getpid()}, **entry}
    answers = {"resize": b"", "orders": Answer(Code.OK, [found]), "status": Answer(Code.OK, [DISK])}
    with answering(tmp_path / "x", lambda request: answers[request["verb"]]) as control:
        service = Client(control.path)
        if is_ours:
            assert 17 == service.resize(name).order
        else:
            with pytest.raises(UnderWay):
                service.resize(name)


@pytest.mark.parametrize(("code", "is_waited_for"), [(Code.GONE, True), (Code.UNREACHABLE, True), (Code.FAILED, False)])
def test_only_a_service_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code, *, is_waited_for: bool
) -> None:
    """One that ends answers for a moment that it does; one that does not say what became of orders never will."""
    monkeypatch.setattr(following, "RETURN_S", 20.0)
    looks = [Answer(code, sentence="no"), Answer(Code.OK, [ENTRY])]
    left = Answer(Code.UNDER_WAY, sentence="the service is replaced", order=17)

    def answer(request: dict[str, Any]) -> Answer:
        if request["verb"] == "orders":
            return looks.pop(0)
        return left if request["verb"] == "resize" else Answer(Code.OK, [DISK])

    with answering(tmp_path / "x", answer) as control:
        if is_waited_for:
            assert 17 == Client(control.path).resize("5/xvda").order
        else:
            with pytest.raises(UnderWay):
                Client(control.path).resize("5/xvda")

    assert 1 - is_waited_for == len(looks)


def test_an_order_that_was_done_is_no_failure_where_its_disk_has_gone(tmp_path: Path) -> None:
    """Whoever ordered it hears that it was done, and that there is no disk any more of which it could be told more."""
    left = Answer(Code.UNDER_WAY, sentence="the service is replaced", order=17)
    answers = {"resize": left, "orders": Answer(Code.OK, [ENTRY]), "status": Answer(Code.OK, [])}
    with (
        answering(tmp_path / "x", lambda request: answers[request["verb"]]) as control,
        pytest.raises(Gone, match=r"order 17 was done.*5/xvda is not in service any more"),
    ):
        Client(control.path).resize("5/xvda")


GIVEN: dict[str, Callable[[Client], Any]] = {
    "set": lambda service: service.set("5/xvda", "aio:/a", replace=True),
    "snapshot": lambda service: service.snapshot("5/xvda", "/new"),
    "resize": lambda service: service.resize("5/xvda"),
    "keep": lambda service: service.keep("5/xvda", "/new"),
    "drop": lambda service: service.drop("5/xvda"),
    "pause": lambda service: service.pause("5/xvda"),
    "resume": lambda service: service.resume("5/xvda"),
    "upgrade": lambda service: service.upgrade("5/xvda"),
    "policy": lambda service: service.policy("5/xvda", "flush=pause"),
    "measure": lambda service: service.measure("5/xvda", 1.0),
    "command": lambda service: service.command("5/xvda", "log", "get"),
}
LOST = {"policy", "measure", "command"}
OTHER = {**DISK, "vbd": "6/xvda", "node": "vbd/6/51712", "domid": 6, "guest": "web", "chain": "aio:/web", "worker": 66}


def left_behind(path: Path, orders: list[dict[str, Any]], *, number: int | None = 17) -> Any:
    """Return a control socket of a service that leaves each order, with its number or killed, to one of two disks."""
    served = [OTHER, {**DISK, "layers": [LAYER]}, OTHER]
    left = b"" if number is None else Answer(Code.UNDER_WAY, sentence="the service is replaced", order=number)
    answers = {"orders": Answer(Code.OK, orders), "status": Answer(Code.OK, served)}
    return answering(path, lambda request: answers.get(request["verb"], left))


@pytest.mark.parametrize("verb", GIVEN)
def test_what_would_be_lost_is_not_waited_for(tmp_path: Path, verb: str) -> None:
    """An order whose answer is more than its end is under way for whoever gave it; each other one is waited for."""
    with left_behind(tmp_path / "x", [ENTRY]) as control:
        if verb in LOST:
            with pytest.raises(UnderWay):
                GIVEN[verb](Client(control.path))
            assert [verb] == [each["verb"] for each in control.asked]
        else:
            assert 17 == GIVEN[verb](Client(control.path)).order


def test_an_order_is_known_by_its_number(tmp_path: Path) -> None:
    """Not by its place among the others; the answer has what is in service of its own disk."""
    orders = [ENTRY, {**ENTRY, "number": 18, "vbd": "6/xvda"}]
    with left_behind(tmp_path / "x", orders) as control:
        changed = GIVEN["set"](Client(control.path))
        upgraded = GIVEN["upgrade"](Client(control.path))

    assert (17, DISK["chain"], ["aio:/img"]) == (changed.order, changed.chain, [each.layer for each in changed.layers])
    assert 12 == upgraded.worker


def test_an_order_that_failed_says_why(tmp_path: Path) -> None:
    """With its number, and the chain that is in service all the same."""
    with (
        left_behind(tmp_path / "x", [{**ENTRY, "code": "failed", "error": "it cannot be"}]) as control,
        pytest.raises(Failed, match="it cannot be") as caught,
    ):
        GIVEN["set"](Client(control.path))

    assert (17, DISK["chain"]) == (caught.value.order, caught.value.chain)


def test_without_a_number_it_is_the_last_one_for_this_guest(tmp_path: Path) -> None:
    """Of several that a program gave; one for another guest's disk of the same name is none."""
    mine = {**ENTRY, "verb": "resize", "began": time.time() + 9, "who": {**ENTRY["who"], "pid": os.getpid()}}
    orders = [mine, {**mine, "number": 18}, {**mine, "number": 19, "vbd": "6/xvda"}]
    for name in ("5/xvda", "mail/xvda"):
        with left_behind(tmp_path / name.partition("/")[0], orders, number=None) as control:
            assert 18 == Client(control.path).resize(name).order
