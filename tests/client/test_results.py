"""A service's answers as typed values."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tests.answering import CHAIN, DISK, ENTRY, LAYER
from xenbackend.client import results
from xenbackend.client.results import Changed, Code, Done, Planned, Policy, Upgraded


def test_a_description_has_everything() -> None:
    """Each key of an answer becomes a field with its type."""
    layer = {**LAYER, "layer": LAYER["text"], "figures": {"hits": 3}}
    del layer["text"]
    disk = results.disk({**DISK, "layers": [layer], "under_way": [{"order": 17, "verb": "set"}]})
    order = results.order(ENTRY)

    assert ("5/xvda", 5, 7, ("user", "calls")) == (disk.vbd, disk.domid, disk.counters["reads"], disk.walls)
    assert ("aio:/img", 1 << 30, {"hits": 3}) == (disk.layers[0].layer, disk.layers[0].size, disk.layers[0].figures)
    assert (17, "set") == (disk.under_way[0].order, disk.under_way[0].verb)
    assert ("aio:/img", Code.OK, 33) == (order.from_, order.code, order.who.pid)


def test_an_answer_to_an_order_is_of_its_class() -> None:
    """The answer to an order becomes an object of its class; keys that an older service leaves out have defaults."""
    changed = results.done(Changed, 17, CHAIN)
    planned = results.done(Planned, None, {**CHAIN, "before": ["aio:/a"], "after": ["log:", "aio:/a"]})

    assert (17, "log:|aio:/img", 4096) == (changed.order, changed.chain, changed.layers[0].physical_sector_size)
    assert ["aio:/a"] == [each.layer for each in planned.before]
    assert ["log:", "aio:/a"] == [each.layer for each in planned.after]
    assert "flush=pause" == results.done(Policy, None, "flush=pause").policy
    assert results.done(Upgraded, None, "upgraded", worker=None).worker is None
    assert {} == results.done(Done, 3, "paused").values


def test_a_histogram_has_all_of_its_buckets() -> None:
    """A layer's histogram has as many buckets as its disk's: those that are not told are empty."""
    times = results.Times(bytes=0, sum_ns=0, buckets={"17": 2, "47": 1})

    assert {17: 2, 47: 1} == {place: count for place, count in enumerate(times.histogram) if count}
    assert len(results.disk(DISK).latency_histogram) == len(times.histogram)


@pytest.mark.parametrize("key", ["vbd", "kind", "domid", "device"])
def test_what_must_be_there_is_missed(key: str) -> None:
    """A disk without a name, or part of one, is an error."""
    with pytest.raises(ValueError, match=key):
        results.disk({name: value for name, value in DISK.items() if name != key})


@pytest.mark.parametrize("key", ["domid", "since", "restarts", "worker", "waits_s"])
def test_a_boolean_is_no_number(key: str) -> None:
    """A boolean is not accepted as a number."""
    with pytest.raises(ValueError, match="True"):
        results.disk({**DISK, key: True})


@pytest.mark.parametrize("key", [each.name for each in fields(results.Disk) if each.name != "values"])
def test_no_field_has_another_type(key: str) -> None:
    """A value of the wrong type is an error in every field."""
    with pytest.raises(ValueError, match=r"no|not"):
        results.disk({**DISK, key: {"x": object()}})
