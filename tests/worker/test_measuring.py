"""The layers of a chain in service are measured by order; the guest does not notice."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.driven import Driven, WorkerProcess
from tests.helpers_block import Machine
from tests.nbd_server import Export, Server
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Reply
from xenbackend.units import PAGE
from xenbackend.worker.measuring import Measuring

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE
CHAIN = "log:|delay:write=20ms|ram:1M"


def counts(reply: Reply) -> list[dict[str, int]]:
    """Return for each layer how many requests of each operation were timed."""
    layers: list[dict[str, Any]] = json.loads(reply.data)
    return [{name: sum(each["buckets"].values()) for name, each in layer["operations"].items()} for layer in layers]


def test_it_measures_each_layer_and_operation_from_then_on(driven: Driven) -> None:
    """A measurement has the requests of its own time, by layer and operation, and shows which layer takes the time."""
    driven.connect("log:|delay:write=300ms|ram:1M")
    early = driven.begin_write(DATA)
    number = driven.worker.put(messages.Measure(3_600_000))
    driven.worker.ask(messages.Command("nosuch", "get", []))  # it has begun
    driven.frontend.wait([early])
    driven.frontend.write(0, DATA)
    driven.frontend.read(0, 8)
    driven.worker.put(messages.Measure(0))
    reply = driven.worker.expect_reply(number)
    driven.frontend.write(0, DATA)
    again = driven.worker.ask(messages.Measure(1))

    seen = {"read": 1, "write": 1}
    assert [seen, seen, {"read": 1, "write": 2}] == counts(reply)  # `delay` still held the early one when it began
    log, delay, ram = (each["operations"]["write"]["sum_ns"] for each in json.loads(reply.data))
    assert log > delay > 300_000_000 > ram
    assert [{}] * 3 == counts(again)
    assert DATA == driven.frontend.read(0, 8)


@pytest.mark.parametrize("milliseconds", [0, 300])
def test_one_ends_where_another_begins(driven: Driven, milliseconds: int) -> None:
    """A new measurement ends the former one, which has the times until then. A measurement of 0 ms only ends it."""
    driven.connect(CHAIN)
    first = driven.worker.put(messages.Measure(3_600_000))
    driven.worker.ask(messages.Command("nosuch", "get", []))  # it has begun
    driven.frontend.write(0, DATA)
    second = driven.worker.put(messages.Measure(milliseconds))
    ended = driven.worker.expect_reply(first)
    driven.frontend.read(0, 8)
    reply = driven.worker.expect_reply(second)

    assert (Code.OK, [{"write": 1}] * 3) == (ended.code, counts(ended))
    assert (Code.OK, [{"read": 1}] * 3 if milliseconds else []) == (reply.code, counts(reply))


def test_nothing_ends_where_nothing_was_begun(driven: Driven) -> None:
    """Ending a measurement when none runs does nothing; the next one is complete."""
    driven.connect(CHAIN)

    assert [Code.OK] * 2 == [driven.worker.ask(messages.Measure(0)).code for _ in range(2)]
    assert 3 == len(counts(driven.worker.ask(messages.Measure(1))))


def test_nothing_ends_before_the_chain_is_open(driven: Driven, images: list[Path]) -> None:
    """While a chain waits for its image's lock, no measurement can begin, and ending one does nothing."""
    other = WorkerProcess(driven.worker.host)
    other.open(f"aio:{images[0]}")
    driven.open(f"aio:{images[0]}", may_wait=True)
    begun, ended = (driven.worker.ask(messages.Measure(each)) for each in (1, 0))
    other.drop()

    assert (Code.FAILED, "the chain is not open") == (begun.code, begun.sentence)
    assert (Code.OK, "[]") == (ended.code, ended.data)


def test_another_chain_is_not_measured(driven: Driven, images: list[Path]) -> None:
    """A chain that is put in during a measurement is not measured; the times are those of the chain it began with."""
    one, two = images
    driven.connect(f"log:|aio:{one}")
    number = driven.worker.put(messages.Measure(60_000))
    driven.worker.ask(messages.Command("nosuch", "get", []))  # it has begun
    driven.frontend.write(0, DATA)
    swapped = driven.worker.ask(messages.Swap(f"aio:{two}", replaces=True, order=3))
    driven.frontend.write(0, DATA)
    driven.worker.put(messages.Measure(0))
    reply = driven.worker.expect_reply(number)
    driven.frontend.write(8, DATA)

    assert (Code.OK, Code.OK) == (swapped.code, reply.code)
    assert 2 == len(counts(reply))
    assert 1 == counts(reply)[0]["write"]
    assert DATA * 2 == driven.frontend.read(0, 16)


def test_a_worker_ends_whoever_waits_for_its_times(driven: Driven) -> None:
    """A worker closes its disk without waiting for a measurement."""
    driven.connect(CHAIN)
    driven.worker.put(messages.Measure(3_600_000))
    driven.disconnect()
    driven.worker.close()


def test_a_measurement_leaves_no_timer_behind() -> None:
    """Once a measurement has ended, requests go through the chain as before, without its timers."""
    with closing(Machine()) as machine:
        chain, times = machine.open("log:|ram:1M", checked=False), list[str]()
        rewired: list[bool] = []
        stages: Any = SimpleNamespace(opened=lambda: chain, rewired=lambda of: rewired.append(of.submit == before))
        before = chain.submit
        channel: Any = SimpleNamespace(reply=lambda _number, _code, data: times.append(data))
        measuring = Measuring(machine.reactor, channel)
        measuring.begin(stages, 3600, 1)
        measuring.end()
        chain.close()

    assert [False, True] == rewired
    assert 2 == len(json.loads(times[0]))


def test_the_end_of_one_waits_for_nothing(driven: Driven, tmp_path: Path) -> None:
    """While an exchange waits for a request that hangs, a measurement can be ended: the one under way with its times,
    and one that waits for its turn without any.
    """
    with Server(tmp_path / "nbd.sock", Export(bytearray(1 << 20)), slow=DATA) as server:
        driven.connect(f"nbd:unix:{server.path},drain=0s")
        first = driven.worker.put(messages.Measure(3_600_000))
        driven.frontend.read(0, 8)
        driven.worker.ask(messages.Command("nosuch", "get", []))  # it has begun
        driven.begin_write(DATA)
        assert server.begun.wait(20)
        swap = driven.worker.put(messages.Swap("ram:1M", replaces=True, order=3))
        second = driven.worker.put(messages.Measure(3_600_000))
        end = driven.worker.put(messages.Measure(0))
        replies = [driven.worker.expect_reply(each) for each in (first, second, end)]
        assert not server.go.is_set()
        server.go.set()
        swapped = driven.worker.expect_reply(swap)
        assert Code.OK is driven.worker.ask(messages.SetPolicy("")).code  # the second one, ended, does not begin

    assert [Code.OK] * 4 == [each.code for each in (*replies, swapped)]
    assert ["[]", "[]"] == [each.data for each in replies[1:]]


def test_a_worker_that_hands_over_says_so_to_whoever_waits(driven: Driven) -> None:
    """A worker that another one replaces says that the measurement is gone, and not that it ended unexpectedly."""
    driven.connect(CHAIN)
    number = driven.worker.put(messages.Measure(3_600_000))
    driven.worker.ask(messages.Command("nosuch", "get", []))  # it has begun
    driven.worker.tell(messages.Close, True)
    reply = driven.worker.expect_reply(number)

    assert (Code.GONE, "the disk's worker was ended before the measurement was done") == (reply.code, reply.sentence)
