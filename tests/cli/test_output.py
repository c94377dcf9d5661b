"""The JSON that scripts get for answers and errors."""

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
    """An error is one object: code and sentence, and beside them what a success would contain."""
    output.print_error(ServiceError(Answer(Code.BUSY, {"chain": "aio:/a"}, "not now", 17)))

    error = {"code": "busy", "sentence": "not now"}
    assert {"version": 1, "order": 17, "chain": "aio:/a", "error": error} == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("problem", "code"),
    [(ConfigError("no"), Code.INVALID), (DriverError("no"), Code.INVALID), (XenbackendError("no"), Code.FAILED)],
)
def test_an_error_of_ours_has_the_code_that_the_service_would_give_it(problem: XenbackendError, code: Code) -> None:
    """Without a service an error has the code that the service would give it."""
    assert Answer(code, sentence="no") == output.answer_of(problem)


def test_a_layer_has_one_name() -> None:
    """A layer's text is always called `layer`; names of counters without values are left out; the rest is kept."""
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
