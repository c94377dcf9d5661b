"""Extracts and checks the values of a request on the control socket.

Must not execute a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xenbackend.block.spec import parse_chain
from xenbackend.errors import ConfigError

SHORTEST_S, LONGEST_S = 0.001, 3600.0
TOKEN_MAX = 64  # characters


def text_of(request: Mapping[str, Any], key: str) -> str:
    """Return the text that a request has under a key. Raises: ConfigError, if it is missing, empty or not a text."""
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"the request needs {key}, a text")
    return value


def token_of(request: Mapping[str, Any]) -> str:
    """Return the token by which the client can find its order again, or an empty text. Raises: ConfigError."""
    value = request.get("token", "")
    if not isinstance(value, str) or len(value) > TOKEN_MAX:
        raise ConfigError(f"the token of an order is a text of at most {TOKEN_MAX} characters")
    return value


def seconds_of(request: Mapping[str, Any]) -> float:
    """Return the number of seconds that a request asks to measure. Raises: ConfigError."""
    value = request.get("seconds")
    if isinstance(value, bool) or not isinstance(value, int | float) or not SHORTEST_S <= value <= LONGEST_S:
        raise ConfigError(f"the request needs seconds, a number from {SHORTEST_S:g} to {LONGEST_S:.0f}")
    return float(value)


def only_reads(verb: str, request: Mapping[str, Any], chain: str) -> bool:
    """Return whether a request changes nothing, so that the ledger does not have to record it as an order."""
    if verb == "policy":
        return not request.get("policy")
    if verb != "command":
        return False
    try:
        layers = parse_chain(chain).layers
    except ConfigError:
        return False
    named = [each.driver for place, each in enumerate(layers) if request.get("layer") in (each.driver.name, str(place))]
    return len(named) == 1 and request.get("command") in named[0].reading
