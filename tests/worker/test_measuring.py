"""The layers of a chain that is in service are measured by order, and the guest notices nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.driven import Driven
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Reply
from xenbackend.units import PAGE

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE
CHAIN = "log:|delay:write=20ms|ram:1M"


def counts(reply: Reply) -> list[dict[str, int]]:
    """Return for each layer how many requests of each operation were timed."""
    layers: list[dict[str, Any]] = json.loads(reply.data)
    return [{name: sum(each["buckets"].values()) for name, each in layer["operations"].items()} for layer in layers]


def test_it_measures_for_a_while_and_stops_by_itself(driven: Driven) -> None:
    """Each layer and operation, from then on: what was in flight when it began is not in it, nor what came later. The
    layer that takes the time is seen to.
    """
    driven.connect(CHAIN)
    early = driven.begin_write(DATA)
    number = driven.worker.put(messages.Measure(300))
    driven.worker.ask(messages.Command("nosuch", "get", []))  # it has begun
    driven.frontend.wait([early])
    driven.frontend.write(0, DATA)
    driven.frontend.read(0, 8)
    reply = driven.worker.expect_reply(number)
    driven.frontend.write(0, DATA)
    again = driven.worker.ask(messages.Measure(1))

    seen = {"read": 1, "write": 1}
    assert [seen, seen, {"read": 1, "write": 2}] == counts(reply)  # `delay` had held the early one until then
    log, delay, ram = (each["operations"]["write"]["sum_ns"] for each in json.loads(reply.data))
    assert log > delay > 20_000_000 > ram
    assert [{}] * 3 == counts(again)
    assert DATA == driven.frontend.read(0, 8)


def test_one_at_a_time(driven: Driven) -> None:
    """Whoever comes second, of an earlier service perhaps, is told so; what the first one has is whole."""
    driven.connect(CHAIN)
    first = driven.worker.put(messages.Measure(200))
    second = driven.worker.ask(messages.Measure(1))

    assert (Code.INVALID, "measured already" in second.sentence) == (second.code, True)
    assert Code.OK == driven.worker.expect_reply(first).code
    assert Code.OK == driven.worker.ask(messages.Measure(1)).code


def test_another_chain_is_not_measured(driven: Driven, images: list[Path]) -> None:
    """What is put in meanwhile is as fast as ever; the times are those of the chain that it was begun with."""
    one, two = images
    driven.connect(f"log:|aio:{one}")
    number = driven.worker.put(messages.Measure(500))
    driven.frontend.write(0, DATA)
    swapped = driven.worker.ask(messages.Swap(f"aio:{two}", replaces=True, order=3))
    driven.frontend.write(0, DATA)
    reply = driven.worker.expect_reply(number)
    driven.frontend.write(8, DATA)

    assert (Code.OK, Code.OK) == (swapped.code, reply.code)
    assert 2 == len(counts(reply))
    assert 1 == counts(reply)[0]["write"]
    assert DATA * 2 == driven.frontend.read(0, 16)


def test_a_worker_ends_whoever_waits_for_its_times(driven: Driven) -> None:
    """It closes the disk at once, and is not kept by a measurement."""
    driven.connect(CHAIN)
    driven.worker.put(messages.Measure(3_600_000))
    driven.disconnect()
    driven.worker.close()
