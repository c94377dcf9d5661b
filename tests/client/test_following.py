"""Waiting for the end of an order, whichever service ends it; tests/cli/test_waiting.py tests the commands."""

from __future__ import annotations

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


class Behind:
    """A service that leaves each order to the next one, by an answer with its number, or by being killed (None); then
    the next one's answers.

    An entry without a token belongs to the latest order.
    """

    def __init__(self, orders: list[dict[str, Any]], served: list[dict[str, Any]], number: int | None = 17) -> None:
        self._orders, self._served = orders, served
        self._left = b"" if number is None else Answer(Code.UNDER_WAY, sentence="it is replaced", order=number)
        self._token = ""

    def answer(self, request: dict[str, Any]) -> Answer | bytes:
        """Answer for both services."""
        if request["verb"] == "orders":
            return Answer(Code.OK, [{**each, "token": each["token"] or self._token} for each in self._orders])
        if request["verb"] == "status":
            return Answer(Code.OK, self._served)
        self._token = request["token"]
        return self._left


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOOK_S", 0.0)


def wait(path: Path, answers: list[Answer], **options: Any) -> Any:
    """Wait for order 17 of a service that gives these answers in turn, and the last one again and again."""
    left = list(answers)
    with answering(path, lambda _: left.pop(0) if len(left) > 1 else left[0]) as control:
        return Client(control.path, **options).wait(17)


def test_it_returns_how_the_order_ended(tmp_path: Path) -> None:
    """`wait` returns a failed order as a value, since it may be somebody else's; it waits for a service that is being
    replaced.
    """
    ticks: list[float] = []
    order = wait(tmp_path / "x", [OPEN, AWAY, OPEN, ENDED], waiting=ticks.append)

    assert (17, Code.FAILED, "no") == (order.number, order.code, order.error)
    assert len(ticks) >= 3


def test_it_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    """After the time limit UnderWay is raised, with the order's number."""
    with pytest.raises(UnderWay, match="order 17") as caught:
        wait(tmp_path / "x", [OPEN], timeout_s=0.05)

    assert 17 == caught.value.order


def test_a_service_that_does_not_come_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not come back is given up after RETURN_S, whether it said that it goes or not."""
    monkeypatch.setattr(following, "RETURN_S", 0.02)
    with pytest.raises(Gone):
        wait(tmp_path / "x", [OPEN, AWAY])
    with pytest.raises(Unreachable):
        Client(str(tmp_path / "none")).wait(17)


@pytest.mark.parametrize("away", [AWAY, Answer(Code.UNREACHABLE, sentence="nobody listens")])
def test_it_waits_for_a_service_since_that_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: Answer) -> None:
    """RETURN_S counts from the moment when the service went, however long the order had been under way."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def sleep(_: float) -> None:
        clock.now += following.RETURN_S * 2 / 3

    clock.sleep = sleep
    monkeypatch.setattr(following, "time", clock)

    heard: list[float] = []
    assert 17 == wait(tmp_path / "x", [OPEN, OPEN, OPEN, away, ENDED], waiting=heard.append).number
    assert clock.now > 2 * following.RETURN_S
    assert [each * following.RETURN_S * 2 / 3 for each in range(1, 5)] == pytest.approx(heard)  # since the wait began


@pytest.mark.parametrize("number", [None, 18])
def test_only_the_order_that_was_given_is_taken_for_it(tmp_path: Path, number: int | None) -> None:
    """Of many equal orders, even at the same moment, only the one that was given is taken for it, whether the service
    told its number or not: else a program could be told that its order was done when it was not.
    """
    ours, others = {**ENTRY, "number": 18}, [{**ENTRY, "token": "another"}, {**ENTRY, "number": 19, "token": "third"}]
    with left_behind(tmp_path / "x", [others[0], ours, others[1]], number=number) as control:
        assert 18 == Client(control.path).resize("5/xvda").order
    with left_behind(tmp_path / "y", others, number=number) as control, pytest.raises(UnderWay):
        Client(control.path).resize("5/xvda")


@pytest.mark.parametrize(("code", "is_waited_for"), [(Code.GONE, True), (Code.UNREACHABLE, True), (Code.FAILED, False)])
def test_only_a_service_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code, *, is_waited_for: bool
) -> None:
    """The client waits for a service that is ending or away, but not for one that cannot say what became of orders."""
    monkeypatch.setattr(following, "RETURN_S", 20.0)
    looks = [Answer(code, sentence="no")]
    service = Behind([ENTRY], [DISK])

    def answer(request: dict[str, Any]) -> Answer | bytes:
        return looks.pop() if request["verb"] == "orders" and looks else service.answer(request)

    with answering(tmp_path / "x", answer) as control:
        if is_waited_for:
            assert 17 == Client(control.path).resize("5/xvda").order
        else:
            with pytest.raises(UnderWay):
                Client(control.path).resize("5/xvda")

    looked = ["orders", "orders"] if is_waited_for else ["orders"]
    assert looked == [each["verb"] for each in control.asked if each["verb"] == "orders"]


def test_an_order_that_was_done_is_no_failure_where_its_disk_has_gone(tmp_path: Path) -> None:
    """If the order was done and its disk has gone since, the error says both."""
    with (
        answering(tmp_path / "x", Behind([ENTRY], []).answer) as control,
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
    """Return the control socket of a service with two disks that leaves each order to the next one."""
    served = [OTHER, {**DISK, "layers": [LAYER]}, OTHER]
    return answering(path, Behind(orders, served, number).answer)


@pytest.mark.parametrize("verb", GIVEN)
def test_what_would_be_lost_is_not_waited_for(tmp_path: Path, verb: str) -> None:
    """An order whose answer would be lost raises UnderWay if its service goes away; all others are waited for."""
    with left_behind(tmp_path / "x", [ENTRY]) as control:
        if verb in LOST:
            with pytest.raises(UnderWay):
                GIVEN[verb](Client(control.path))
            assert [verb] == [each["verb"] for each in control.asked]
        else:
            assert 17 == GIVEN[verb](Client(control.path)).order


def test_the_answer_has_what_is_in_service_of_its_own_disk(tmp_path: Path) -> None:
    """The result has the chain, layers and worker of the order's own disk."""
    orders = [ENTRY, {**ENTRY, "number": 18, "vbd": "6/xvda", "token": "another"}]
    with left_behind(tmp_path / "x", orders) as control:
        changed = GIVEN["set"](Client(control.path))
        upgraded = GIVEN["upgrade"](Client(control.path))

    assert (17, DISK["chain"], ["aio:/img"]) == (changed.order, changed.chain, [each.layer for each in changed.layers])
    assert 12 == upgraded.worker


def test_an_order_that_failed_says_why(tmp_path: Path) -> None:
    """A failed order raises its error, with its number and the chain in service."""
    with (
        left_behind(tmp_path / "x", [{**ENTRY, "code": "failed", "error": "it cannot be"}]) as control,
        pytest.raises(Failed, match="it cannot be") as caught,
    ):
        GIVEN["set"](Client(control.path))

    assert (17, DISK["chain"]) == (caught.value.order, caught.value.chain)
