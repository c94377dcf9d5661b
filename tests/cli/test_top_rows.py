"""Rows of the live view: what changed, and how the latency developed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.answering import DISK, moved, typed_disk, typed_service
from xenbackend.cli import top_rows
from xenbackend.cli.pictures import Picture, Speed
from xenbackend.cli.top_rows import History, Row, View, arranged, sparkline

OTHER = {**deepcopy(DISK), "vbd": "6/xvdb", "node": "vbd/6/51728", "domid": 6, "guest": "web", "chain": "ram:1G"}


def picture(*disks: dict[str, Any], at: float = 0.0) -> Picture:
    """Return what the service said at a certain time."""
    return Picture(typed_service(), [typed_disk(each) for each in disks], at)


def test_latency_is_of_each_interval_and_remembered() -> None:
    """Each look adds the mean of its own interval to the history; a disk that goes and comes back starts a new one."""
    history = History()
    known = deepcopy(DISK)
    [first] = history.take(picture(known))
    for step, mean_ns in enumerate((1000, 4000), 1):
        known = moved(known, reads=10, latency_samples=10, latency_ns=10 * mean_ns)
        [row] = history.take(picture(known, at=float(step)))
    [row, other] = history.take(picture(known, OTHER, at=3.0))
    [gone] = history.take(picture(OTHER, at=4.0))

    assert (None, ()) == (first.moved.rates, first.history)
    assert (1000.0, 4000.0, None) == row.history
    assert (None,) == other.history
    assert (None, None) == gone.history


def test_only_so_much_is_remembered() -> None:
    """The history has a limit: a view that runs for days takes no more memory."""
    history = History()
    for at in range(3 * top_rows.REMEMBERED):
        [row] = history.take(picture(DISK, at=float(at)))

    assert top_rows.REMEMBERED == len(row.history)


@pytest.mark.parametrize(
    ("view", "found"),
    [
        (View(), ["5/xvda", "6/xvdb"]),
        (View(is_reversed=True), ["6/xvdb", "5/xvda"]),
        (View(sort="queue"), ["6/xvdb", "5/xvda"]),
        (View(filter="WEB"), ["6/xvdb"]),
        (View(filter="log:"), ["5/xvda"]),
        (View(filter="connected"), ["5/xvda", "6/xvdb"]),
        (View(filter="none"), []),
    ],
)
def test_order_and_filter(view: View, found: list[str]) -> None:
    """The filter looks at names, states and chains, ignoring case."""
    rows = History().take(picture(DISK, moved(OTHER, in_flight=9)))

    assert found == [row.known.vbd for row in arranged(rows, view)]
    assert all(row.in_flight == (9 if row.known.vbd == "6/xvdb" else 0) for row in rows)


def test_every_order_comes_round() -> None:
    """The sort key goes through all orders, in both directions."""
    view = View()
    seen = [(view := view.next_sort()).sort for _ in top_rows.SORTS]

    assert set(top_rows.SORTS) == set(seen)
    assert "disk" == seen[-1]
    assert "queue" == View().next_sort(-1).sort


def test_sparklines() -> None:
    """The greatest value is the tallest bar, a missing one a space; the latest is at the right; zeros are allowed."""
    assert "  ▁█ ▅" == sparkline([0.0, 800.0, None, 400.0], 6)
    assert "*%" == sparkline([900.0, 100.0, 140.0], 2, top_rows.PLAIN_BARS)
    assert "▁▁" == sparkline([0.0, 0.0], 2)
    assert "" == sparkline([1.0], 0)
    assert "   " == sparkline([], 3)


def test_layers_and_values() -> None:
    """A layer's line shows its figures and escapes control characters; JSON has rates, and null if there are none."""
    layer = {"layer": "throttle:iops=5\x1b", "figures": {"held": 3}}
    row = Row(typed_disk(layers=[layer, {"layer": "aio:/img", "figures": {}}]), Speed())

    assert [r"throttle:iops=5\x1b  [held 3]", "aio:/img"] == top_rows.layers(row)
    values = top_rows.values(row)
    assert (None, None, 0, 3) == tuple(values[key] for key in ("reads_per_s", "mean_ns", "in_flight", "errors"))
