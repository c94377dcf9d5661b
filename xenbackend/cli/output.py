"""Prints what scripts read: JSON with a version, errors too.

Must not know a command. docs/json.md is the schema; a test compares it with what commands print.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xenbackend.protocol import plain
from xenbackend.protocol.answers import VERSION, Answer, code_of
from xenbackend.protocol.client import ServiceError
from xenbackend.protocol.codes import Code

if TYPE_CHECKING:
    from xenbackend.client import Done

layer_values = plain.layer


def print_json(values: Mapping[str, Any], indent: int | None = None) -> None:
    """Print one object with the version of its keys."""
    print(json.dumps({"version": VERSION, **values}, indent=indent))


def print_error(problem: Exception) -> None:
    """Print an error as JSON: the keys of a success, as far as they are known, and the reason for the failure."""
    answer = answer_of(problem)
    print_json({**values_of(answer), **error_object(answer.code, answer.sentence)})


def error_object(code: Code, sentence: str) -> dict[str, Any]:
    """Return the part of JSON that says what went wrong."""
    return {"error": {"code": code.value, "sentence": sentence}}


def answer_of(problem: Exception) -> Answer:
    """Return an error as the service would have answered it."""
    return problem.answer if isinstance(problem, ServiceError) else Answer(code_of(problem), sentence=str(problem))


def values_of(answer: Answer | Done) -> dict[str, Any]:
    """Return the data of an answer to an order, under the names of docs/json.md."""
    data = plain.answered(answer.data) if isinstance(answer, Answer) else answer.values
    return ({"order": answer.order} if answer.order is not None else {}) | data
