"""What a worker says of its layers' times, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest

from xenbackend.errors import ConfigError
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Reply
from xenbackend.supervisor.vbd.measured import answer_of, seconds_of

GOOD = '[{"layer": "aio:/img", "operations": {"read": {"bytes": 512, "sum_ns": 3, "buckets": {"2": 1}}}}]'


def test_what_it_has_measured_is_handed_on() -> None:
    """With the chain and the interval that were meant; nobody is blamed."""
    breaches: list[str] = []
    answer = answer_of(Reply(1, Code.OK, data=GOOD), "aio:/img", 2.0, breaches.append)

    assert (Code.OK, [], "aio:/img", 2.0) == (answer.code, breaches, answer.data["chain"], answer.data["seconds"])
    assert 512 == answer.data["layers"][0]["operations"]["read"]["bytes"]


NOTHING = GOOD.replace('{"2": 1}', "{}"), GOOD.replace('"2": 1', '"2": 0')  # whoever divides by it ends


@pytest.mark.parametrize("data", ["", "7", "[1]", "[" * 100_000, GOOD.replace("512", "-1"), *NOTHING])
def test_a_worker_that_lies_is_killed(data: str) -> None:
    """Whoever asked hears of it, and nobody of what it said."""
    breaches: list[str] = []
    answer = answer_of(Reply(1, Code.OK, data=data), "aio:/img", 2.0, breaches.append)

    assert (Code.FAILED, 1, []) == (answer.code, len(breaches), answer.data["layers"])
    assert "was killed" in answer.sentence


def test_what_failed_has_its_own_sentence() -> None:
    """A worker that died, for example."""
    answer = answer_of(Reply(1, Code.GONE, "it died"), "aio:/img", 2.0, pytest.fail)

    assert (Code.GONE, "it died") == (answer.code, answer.sentence)


@pytest.mark.parametrize("value", [None, "5", 0, -1, 0.0004, True, 3601, float("nan"), float("inf"), [1]])
def test_for_how_long_it_can_be_measured(value: Any) -> None:
    """For an hour at most, as it stops by itself; and not for less than a worker can be told."""
    with pytest.raises(ConfigError, match="seconds"):
        seconds_of(value)


@pytest.mark.parametrize("value", [0.001, 1, 2.5, 3600])
def test_both_limits_can_be_measured(value: float) -> None:
    """And what lies between them; whole seconds are a number of the kind that a worker is told."""
    assert (value, float) == (seconds_of(value), type(seconds_of(value)))
