"""What a request on the control socket says."""

from __future__ import annotations

from typing import Any

import pytest

from xenbackend.errors import ConfigError
from xenbackend.supervisor.vbd.requests import only_reads, seconds_of, text_of, token_of

CHAIN = "log:|log:|null:1G"


@pytest.mark.parametrize("value", [None, "", 5, ["x"]])
def test_a_text_that_is_needed_is_one(value: Any) -> None:
    """A required text that is missing, empty or something else is refused, with its key."""
    assert text_of({"chain": "ram:1M"}, "chain") == "ram:1M"
    with pytest.raises(ConfigError, match="needs chain, a text"):
        text_of({"chain": value}, "chain")


@pytest.mark.parametrize("value", [5, None, "x" * 65, ["x"]])
def test_a_token_is_bounded(value: Any) -> None:
    """A token, which is remembered with each order, is a text of at most 64 characters, and may be left out."""
    assert ("", "x" * 64) == (token_of({}), token_of({"token": "x" * 64}))
    with pytest.raises(ConfigError, match="at most 64 characters"):
        token_of({"token": value})


@pytest.mark.parametrize(
    ("layer", "command", "reads"),
    [
        ("0", "get", True), ("1", "status", True), ("0", "clear", False), ("2", "get", False), ("log", "get", False),
        ("3", "get", False), ("0", "nonsense", False), (None, None, False),
    ],
)  # fmt: skip
def test_commands_that_only_read_are_known(layer: str | None, command: str | None, *, reads: bool) -> None:
    """A command only reads if the layer's driver says so of the verb; a layer must be given by its number."""
    assert reads == only_reads("command", {"layer": layer, "command": command}, CHAIN)
    assert not only_reads("command", {"layer": layer, "command": command}, "no chain")


@pytest.mark.parametrize(
    ("verb", "request_", "reads"),
    [
        ("policy", {}, True),
        ("policy", {"policy": ""}, True),
        ("policy", {"policy": "write=report"}, False),
        ("pause", {}, False),
    ],
)
def test_a_policy_is_asked_for_without_one(verb: str, request_: dict[str, str], *, reads: bool) -> None:
    """The verb `policy` without a policy only reads."""
    assert reads == only_reads(verb, request_, CHAIN)


@pytest.mark.parametrize("value", [None, "5", 0, -1, 0.0004, True, 3601, float("nan"), float("inf"), [1]])
def test_for_how_long_it_can_be_measured(value: Any) -> None:
    """A measurement lasts for an hour at most, as it stops by itself, and for a millisecond at least."""
    with pytest.raises(ConfigError, match="seconds"):
        seconds_of({"seconds": value})


@pytest.mark.parametrize("value", [0.001, 1, 2.5, 3600])
def test_both_limits_can_be_measured(value: float) -> None:
    """Both limits, and what lies between them, are valid; whole seconds become a float, as the message needs it."""
    assert (value, float) == (seconds_of({"seconds": value}), type(seconds_of({"seconds": value})))
