"""Checks what a worker says of the times of its layers, because a worker is not trusted.

Must not ask the worker.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from xenbackend.block.timed import parse_times
from xenbackend.protocol import messages
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code


def answer_of(chain: str, seconds: float, breach: Callable[[str], None], reply: messages.Reply) -> Answer:
    """Return the answer for the client that ordered a measurement, which lasted `seconds`.

    Call `breach` if the worker's reply has no valid times.
    """
    code, sentence, layers = reply.code, reply.sentence, []
    if code is Code.OK:
        try:
            layers = parse_times(json.loads(reply.data))
        except (ValueError, RecursionError):
            code, sentence = Code.FAILED, "its worker did not tell valid times, and was killed"
            breach("its message about its layers' times is not valid")
    return Answer(code, {"chain": chain, "seconds": seconds, "layers": layers}, sentence)
