"""The service's answers, encoded and decoded."""

from __future__ import annotations

import json

import pytest

from xenbackend.protocol.answers import VERSION, Answer
from xenbackend.protocol.codes import Code


@pytest.mark.parametrize(
    "answer",
    [
        Answer(Code.OK),
        Answer(Code.OK, {"chain": "null:1G"}, order=17),
        Answer(Code.BUSY, {"chain": "null:1G"}, "a set is under way, order 3; wait for it", 17),
    ],
)
def test_an_answer_comes_back_as_it_was(answer: Answer) -> None:
    """An answer is the same after JSON, and has a version; it has an error only if something was not done."""
    line = json.dumps(answer.as_json())

    assert answer == Answer.from_json(json.loads(line))
    assert ("error" in json.loads(line)) == (answer.code is not Code.OK)


@pytest.mark.parametrize(
    "line", [None, [], "ok", {}, {"version": VERSION + 1, "code": "ok"}, {"version": VERSION, "code": "fine"}]
)
def test_what_is_no_answer_is_refused(line: object) -> None:
    """Another version, another code, or anything else that is not an answer raises ValueError."""
    with pytest.raises(ValueError, match=r"."):
        Answer.from_json(line)
