"""The caller's side of the control socket, with services that work, take long, or misbehave."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.answering import answering
from xenbackend.protocol import client
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import ServiceError, call, give_order
from xenbackend.protocol.codes import Code

SET = {"verb": "set", "vbd": "5/xvda", "chain": "null:1G"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TICK_S", 0.01)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_a_no_has_code_sentence_and_what_is_known(tmp_path: Path, code: Code) -> None:
    """A refusal reaches the caller with its code, sentence, data and order number."""
    answer = Answer(code, {"chain": "null:1G"}, "it cannot be", 17)
    with (
        answering(tmp_path / "x", lambda _: answer) as control,
        pytest.raises(ServiceError, match="cannot be") as caught,
    ):
        call(control.path, {"verb": "set"})

    assert answer == caught.value.answer


@pytest.mark.parametrize(
    ("said", "code", "sentence"),
    [
        (b"", Code.GONE, "closed the connection before it answered"),
        (b'{"version": 1', Code.GONE, "closed the connection before it answered"),
        (b'{"error": "as release 0.1.0 says it"}\n', Code.FAILED, "^as release 0.1.0 says it$"),
        (b'{"version": 2, "code": "ok", "data": 1}\n', Code.FAILED, "not a service of this version; restart it"),
        (b"[]\n", Code.FAILED, "not a service of this version"),
        (b"\xff\n", Code.FAILED, "not a service of this version"),
        (b'{"version": 1, "code": "what"}\n', Code.FAILED, "not a service of this version"),
        (b'{"version": 1}\n', Code.FAILED, "not a service of this version"),
        (None, Code.UNREACHABLE, r"did not answer within 0\.05 s"),
    ],
)
def test_every_failure_is_a_sentence(tmp_path: Path, said: bytes | None, code: Code, sentence: str) -> None:
    """If the service hangs up, is silent, or sends what is not an answer, the caller gets a code and a sentence."""
    with answering(tmp_path / "x", lambda _: said) as control, pytest.raises(ServiceError, match=sentence) as caught:
        call(control.path, {"verb": "ping"}, 0.05 if said is None else 5.0)

    assert code is caught.value.answer.code


def test_no_service_is_unreachable(tmp_path: Path) -> None:
    """If nothing listens, the caller gets UNREACHABLE, since nothing was asked; that holds for orders too."""
    for ask in (lambda path: call(path, SET), lambda path: give_order(path, SET, "5/xvda: set", 1.0)):
        with pytest.raises(ServiceError, match="systemctl start xenbackend") as caught:
            ask(str(tmp_path / "none"))
        assert Code.UNREACHABLE is caught.value.answer.code


def test_an_order_waits_as_long_as_the_service_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order waits longer than a question may, and a callback is told how long it has waited."""
    monkeypatch.setattr(client, "TIMEOUT_S", 0.0)
    ticks: list[float] = []
    enough = threading.Event()

    def waiting(waited_s: float) -> None:
        ticks.append(waited_s)
        if len(ticks) == 5:
            enough.set()

    def answer(_: object) -> Answer:
        enough.wait(20)
        return Answer(Code.OK, {"chain": "null:1G"}, order=17)

    with answering(tmp_path / "x", answer) as control:
        given = give_order(control.path, SET, "5/xvda: set", waiting=waiting)

    assert Answer(Code.OK, {"chain": "null:1G"}, order=17) == given
    assert SET == control.asked[0]
    assert sorted(ticks) == ticks


@pytest.mark.parametrize(
    ("number", "where"), [(17, "order 17; see: xenbackend orders 17"), (None, "see: xenbackend status")]
)
def test_a_time_limit_is_the_services_to_keep(tmp_path: Path, number: int | None, where: str) -> None:
    """A time limit is passed to the service, whose answer then names the order that is still under way."""
    answer = Answer(Code.UNDER_WAY, {"chain": "null:2G"}, "it is still under way", number)
    with answering(tmp_path / "x", lambda _: answer) as control, pytest.raises(ServiceError) as caught:
        give_order(control.path, SET, "5/xvda: set", 3.5)

    assert {**SET, "wait": 3.5} == control.asked[0]
    assert f"5/xvda: set is still under way, {where}" == str(caught.value)
    assert (Code.UNDER_WAY, {"chain": "null:2G"}, number) == (
        caught.value.answer.code, caught.value.answer.data, caught.value.answer.order,
    )  # fmt: skip


@pytest.mark.parametrize(("said", "why"), [(b"", "closed the connection"), (None, "did not answer within")])
def test_an_order_that_was_sent_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes | None, why: str
) -> None:
    """If a service ends or hangs after it got an order, the order counts as possibly under way, and not as failed."""
    monkeypatch.setattr(client, "TIMEOUT_S", 0.0)
    with answering(tmp_path / "x", lambda _: said) as control, pytest.raises(ServiceError, match=why) as caught:
        give_order(control.path, SET, "5/xvda: set", 0.05)

    assert Code.UNDER_WAY is caught.value.answer.code
    assert str(caught.value).startswith("5/xvda: set may be under way")
    assert "xenbackend orders" in str(caught.value)
