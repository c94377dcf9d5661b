"""The times of layers that a worker reports, and how they are checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Reply
from xenbackend.supervisor.vbd.measured import answer_of

GOOD = '[{"layer": "aio:/img", "operations": {"read": {"bytes": 512, "sum_ns": 3, "buckets": {"2": 1}}}}]'


def answered(reply: Reply, breach: Callable[[str], object]) -> Answer:
    """Return the answer for a measurement that lasted two seconds."""
    return answer_of("aio:/img", 2.0, breach, reply)


def test_what_it_has_measured_is_handed_on() -> None:
    """A valid report is handed on with the chain and the interval that were measured."""
    breaches: list[str] = []
    answer = answered(Reply(1, Code.OK, data=GOOD), breaches.append)

    assert (Code.OK, [], "aio:/img", 2.0) == (answer.code, breaches, answer.data["chain"], answer.data["seconds"])
    assert 512 == answer.data["layers"][0]["operations"]["read"]["bytes"]


NOTHING = GOOD.replace('{"2": 1}', "{}"), GOOD.replace('"2": 1', '"2": 0')  # whoever divides by it fails


@pytest.mark.parametrize("data", ["", "7", "[1]", "[" * 100_000, GOOD.replace("512", "-1"), *NOTHING])
def test_a_worker_that_lies_is_killed(data: str) -> None:
    """A worker whose report is invalid is killed; the client is told so, and gets nothing of the report."""
    breaches: list[str] = []
    answer = answered(Reply(1, Code.OK, data=data), breaches.append)

    assert (Code.FAILED, 1, []) == (answer.code, len(breaches), answer.data["layers"])
    assert "was killed" in answer.sentence


def test_what_failed_has_its_own_sentence() -> None:
    """If the worker's reply is an error, the client gets that error."""
    answer = answered(Reply(1, Code.GONE, "it died"), pytest.fail)

    assert (Code.GONE, "it died") == (answer.code, answer.sentence)
