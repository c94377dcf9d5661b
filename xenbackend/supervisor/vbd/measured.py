"""What a worker says of the times of its layers, which is not believed.

Must not ask it.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from xenbackend.block.timed import parse_times
from xenbackend.errors import ConfigError
from xenbackend.protocol import messages
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

SHORTEST_S, LONGEST_S = 0.001, 3600.0


def seconds_of(value: object) -> float:
    """Return for how long an administrator wants to measure. Raises: ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not SHORTEST_S <= value <= LONGEST_S:
        raise ConfigError(f"the request needs seconds, a number from {SHORTEST_S:g} to {LONGEST_S:.0f}")
    return float(value)


def answer_of(reply: messages.Reply, chain: str, seconds: float, breach: Callable[[str], None]) -> Answer:
    """Return the answer to who has ordered it; `breach` is told of what is none."""
    code, sentence, layers = reply.code, reply.sentence, []
    if code is Code.OK:
        try:
            layers = parse_times(json.loads(reply.data))
        except (ValueError, RecursionError):
            code, sentence = Code.FAILED, "its worker has told no times, and was killed"
            breach("what it says of its layers' times is none of that")
    return Answer(code, {"chain": chain, "seconds": seconds, "layers": layers}, sentence)
