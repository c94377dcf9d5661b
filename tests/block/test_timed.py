"""Timers between layers: what they count, and that they leave the chain as it was."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.helpers_block import SIZE, Machine, content, image, read, write
from xenbackend.block.driver import Filter, NoOptions
from xenbackend.block.request import Op, Request
from xenbackend.block.timed import Timed, parse_times

MS = 1_000_000


class Held(Filter):
    """A layer that holds requests until the test completes them."""

    def __init__(self) -> None:
        super().__init__(NoOptions())
        self.held: list[Request] = []

    def submit(self, batch: list[Request]) -> None:
        """Hold them."""
        self.held += batch


def request(op: Op, length: int) -> Request:
    """Return a request."""
    made = Request()
    made.op, made.length = op, length
    return made


def test_each_operation_has_its_times() -> None:
    """Each operation is timed from submission to completion, with its bytes, in buckets by powers of two."""
    now = [0]
    timer, below, back = Timed("x:", lambda: now[0]), Held(), []
    timer.next, timer.complete, below.complete = below, back.extend, timer.on_complete
    read, write = request(Op.READ, 4096), request(Op.WRITE, 512)
    timer.submit([read, write])
    now[0] = 3 * MS
    below.complete([write])
    now[0] = 5 * MS
    below.complete([read])

    assert [write, read] == back
    assert {
        "layer": "x:",
        "operations": {
            "read": {"bytes": 4096, "sum_ns": 5 * MS, "buckets": {"23": 1}},
            "write": {"bytes": 512, "sum_ns": 3 * MS, "buckets": {"22": 1}},
        },
    } == timer.as_json()
    assert [timer.as_json()] == parse_times([timer.as_json()])


def test_what_it_has_not_seen_begin_is_passed_on() -> None:
    """A request that was in flight before the timer came is passed on and not counted."""
    timer, back = Timed("x:"), []
    timer.complete = back.extend
    stray = request(Op.READ, 512)
    timer.on_complete([stray])

    assert [stray] == back
    assert {} == timer.as_json()["operations"]


@pytest.mark.parametrize(
    "filters",
    ["", "log:|", "log:|delay:read=2ms|", "cow:|", "throttle:iops=5000|log:|", "silent:|log:|silent:|silent:|"],
)
@pytest.mark.parametrize("source", ["aio", "sync"])
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.usefixtures("events")
def test_timers_come_and_go_in_service(tmp_path: Path, filters: str, source: str, *, checked: bool) -> None:
    """Timers are inserted and removed while requests are in flight. Whatever the layers, each request comes back once
    with the right data, each layer is timed, and afterwards the chain is wired as before.
    """
    machine = Machine()
    chain = machine.open(f"{filters}{source}:{image(tmp_path / 'img', SIZE)}", checked=checked)
    model = bytearray(image(tmp_path / "same", SIZE).read_bytes())
    random = Random(7)
    back: list[Request] = []

    def take(done: list[Request]) -> None:
        back.extend(done)
        if len(back) == len(given):
            machine.reactor.stop()

    given: list[Request] = []
    chain.complete = take
    wired = [(each.driver.submit, each.driver.complete) for each in chain.layers]
    for change in (chain.time, chain.untime) * 4:
        back.clear()
        writes = [write(place * 4096, random.randbytes(4096)) for place in random.sample(range(SIZE // 4096), 3)]
        given = [*writes, read(0, 4096)] if 0 not in [each.offset for each in writes] else writes
        chain.submit(given[:])
        timers = change() or timers  # noqa: F821 - the first change gives them
        if len(back) < len(given):
            machine.reactor.run()
        assert sorted(map(id, given)) == sorted(map(id, back))
        assert {0} == {each.status for each in given}
        for each in writes:
            model[each.offset : each.offset + 4096] = content(each)
        if change == chain.time:
            machine.do(chain, write(8192, bytes(4096)))
            model[8192:12288] = bytes(4096)
            written = [sum(each.times[Op.WRITE].buckets) > 0 for each in timers]
            assert [True, not filters.startswith("cow")] == [all(written[:-1]), written[-1]]
            chain.complete = take
    everything = machine.everything(chain)
    chain.complete = take

    assert bytes(model) == everything
    assert wired == [(each.driver.submit, each.driver.complete) for each in chain.layers]
    chain.close()
    machine.close()


@pytest.mark.parametrize(
    "values",
    [
        {}, [1], [{"layer": 1, "operations": {}}], [{"layer": "", "operations": []}],
        [{"layer": "", "operations": {"x": 1}}],
        [{"layer": "", "operations": {"read": 1}}], [{"layer": "", "operations": {}, "more": 1}],
        *([{"layer": "", "operations": {"read": {"bytes": 0, "sum_ns": 0, "buckets": {}} | {key: value}}}]
          for key, value in (("bytes", -1), ("bytes", True), ("sum_ns", 1 << 64), ("sum_ns", 1.5), ("buckets", []),
                             ("buckets", {"48": 1}), ("buckets", {"1": "x"}), ("more", 1))),
    ],
)  # fmt: skip
def test_what_a_timer_cannot_have_said(values: Any) -> None:
    """Times that no timer can have measured are refused, because a worker may send anything."""
    with pytest.raises(ValueError, match="not "):
        parse_times(values)
