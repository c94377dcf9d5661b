"""What scripts get: JSON with a version, errors too.

Must not know a command. docs/json.md is the schema; a test compares it with what commands print.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xenbackend.protocol.answers import VERSION, Answer, code_of
from xenbackend.protocol.client import ServiceError
from xenbackend.protocol.codes import Code


def print_json(values: Mapping[str, Any], indent: int | None = None) -> None:
    """Print one object with the version of its keys."""
    print(json.dumps({"version": VERSION, **values}, indent=indent))


def print_error(problem: Exception) -> None:
    """Print an error as JSON: what a success would say, as far as it is known, and why there is none."""
    answer = answer_of(problem)
    print_json({**values_of(answer), **error_object(answer.code, answer.sentence)})


def error_object(code: Code, sentence: str) -> dict[str, Any]:
    """Return the part of JSON that says what went wrong."""
    return {"error": {"code": code.value, "sentence": sentence}}


def answer_of(problem: Exception) -> Answer:
    """Return an error as the service would have answered it."""
    return problem.answer if isinstance(problem, ServiceError) else Answer(code_of(problem), sentence=str(problem))


def values_of(answer: Answer) -> dict[str, Any]:
    """Return what an answer to an order says, with one name for each idea."""
    data = dict(answer.data) if isinstance(answer.data, Mapping) else {}
    for key in ("layers", "before", "after"):
        if isinstance(data.get(key), list):
            data[key] = [layer_values(each) for each in data[key]]
    return ({"order": answer.order} if answer.order is not None else {}) | data


def layer_values(layer: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return what a layer said of itself, or only its text, under the names that scripts get: its text is `layer`."""
    values = {"text": layer} if isinstance(layer, str) else dict(layer)
    if isinstance(values.get("figures"), list):  # names only: of a chain that is not in service
        del values["figures"]
    return {"layer": values.pop("text"), **values} if "text" in values else values
