"""What a worker says of the times of its layers, which is not believed.

Must not ask it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from xenbackend.block.timed import parse_times
from xenbackend.protocol import messages
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code


def answer_of(chain: str, seconds: float, begun: float, breach: Callable[[str], None], reply: messages.Reply) -> Answer:
    """Return the answer to who has ordered it for `seconds`, at `begun` of the monotonic clock; it may have been ended.

    `breach` is told of what is none.
    """
    seconds = min(seconds, round(time.monotonic() - begun, 3))
    code, sentence, layers = reply.code, reply.sentence, []
    if code is Code.OK:
        try:
            layers = parse_times(json.loads(reply.data))
        except (ValueError, RecursionError):
            code, sentence = Code.FAILED, "its worker has told no times, and was killed"
            breach("what it says of its layers' times is none of that")
    return Answer(code, {"chain": chain, "seconds": seconds, "layers": layers}, sentence)
