"""What a request says."""

from __future__ import annotations

from typing import Any

import pytest

from xenbackend.errors import ConfigError
from xenbackend.supervisor.vbd.requests import only_reads, seconds_of, text_of, token_of

CHAIN = "log:|log:|null:1G"


@pytest.mark.parametrize("value", [None, "", 5, ["x"]])
def test_a_text_that_is_needed_is_one(value: Any) -> None:
    """What else there is, or is not, is told by its key."""
    assert text_of({"chain": "ram:1M"}, "chain") == "ram:1M"
    with pytest.raises(ConfigError, match="needs chain, a text"):
        text_of({"chain": value}, "chain")


@pytest.mark.parametrize("value", [5, None, "x" * 65, ["x"]])
def test_a_token_is_bounded(value: Any) -> None:
    """It is remembered with each order; without one an order has none."""
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
    """A driver says which of its verbs somebody polls; one that nobody can name by its driver alone is none of them."""
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
    """All else changes things."""
    assert reads == only_reads(verb, request_, CHAIN)


@pytest.mark.parametrize("value", [None, "5", 0, -1, 0.0004, True, 3601, float("nan"), float("inf"), [1]])
def test_for_how_long_it_can_be_measured(value: Any) -> None:
    """For an hour at most, as it stops by itself; and not for less than a worker can be told."""
    with pytest.raises(ConfigError, match="seconds"):
        seconds_of({"seconds": value})


@pytest.mark.parametrize("value", [0.001, 1, 2.5, 3600])
def test_both_limits_can_be_measured(value: float) -> None:
    """And what lies between them; whole seconds are a number of the kind that a worker is told."""
    assert (value, float) == (seconds_of({"seconds": value}), type(seconds_of({"seconds": value})))
