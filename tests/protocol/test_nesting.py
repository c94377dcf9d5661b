"""Messages with nested values, of any depth."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from xenbackend.protocol import codec
from xenbackend.protocol.messages import VERSION, Ask, Command

DEEP = "DEEP"
MESSAGES: list[dict[str, Any]] = [
    {"kind": "Reply", "id": DEEP, "code": "ok"},
    {"kind": "Log", "level": "info", "event": DEEP},
    codec.as_fields(Ask(1, Command(DEEP, "status", []))) | {"kind": "Ask"},
    codec.as_fields(Ask(1, Command("log", "status", [DEEP]))) | {"kind": "Ask"},
]


@pytest.mark.parametrize("message", MESSAGES, ids=["Reply", "Log", "Ask", "Ask for a list"])
def test_a_value_of_any_depth_is_no_message(message: dict[str, Any]) -> None:
    """A nested value is refused at any depth in the same way, around the limit of the interpreter's stack too."""
    text = json.dumps({"version": VERSION, **message})
    for depth in range(sys.getrecursionlimit() * 2 // 3, sys.getrecursionlimit() + 50):
        for deep in ("[" * depth + "]" * depth, '{"x":' * depth + "0" + "}" * depth):
            with pytest.raises(codec.NotAMessage):
                codec.from_worker(text.replace(f'"{DEEP}"', deep).encode())
