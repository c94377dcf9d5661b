"""What scripts get of answers and errors."""

from __future__ import annotations

import json

import pytest

from tests.answering import CHAIN, LAYER
from xenbackend.cli import output
from xenbackend.errors import ConfigError, DriverError, XenbackendError
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import ServiceError
from xenbackend.protocol.codes import Code


def test_an_error_says_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """It is one object: code and sentence, and beside them what a success would say."""
    output.print_error(ServiceError(Answer(Code.BUSY, {"chain": "aio:/a"}, "not now", 17)))

    error = {"code": "busy", "sentence": "not now"}
    assert {"version": 1, "order": 17, "chain": "aio:/a", "error": error} == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("problem", "code"),
    [(ConfigError("no"), Code.INVALID), (DriverError("no"), Code.INVALID), (XenbackendError("no"), Code.FAILED)],
)
def test_an_error_of_ours_has_the_code_that_the_service_would_give_it(problem: XenbackendError, code: Code) -> None:
    """Whose mistake it is decides, with and without a service."""
    assert Answer(code, sentence="no") == output.answer_of(problem)


def test_a_layer_has_one_name() -> None:
    """What a layer is called stands under `layer`, wherever layers are listed; the names of what it counts are
    left out where the values are not there, and nothing else is changed.
    """
    values = output.values_of(Answer(Code.OK, {**CHAIN, "before": ["aio:/a"], "after": [{"text": "aio:/b"}]}, order=3))
    others = {key: value for key, value in LAYER.items() if key not in ("text", "figures")}

    assert {
        "order": 3,
        "chain": CHAIN["chain"],
        "layers": [{"layer": LAYER["text"], **others}],
        "before": [{"layer": "aio:/a"}],
        "after": [{"layer": "aio:/b"}],
    } == values
    assert {} == output.values_of(Answer(Code.OK, "text"))
