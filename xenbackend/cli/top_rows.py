"""What `xenbackend top` shows of each disk: its speed since the last look, and the history of its latency.

Must not ask anybody, nor print.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xenbackend.cli import pictures
from xenbackend.cli.pictures import Picture, Speed
from xenbackend.client import Disk
from xenbackend.errors import printable

REMEMBERED = 60  # intervals; the sparkline shows as many as there is room for
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=+*#%"  # for terminals that have no others


@dataclass(frozen=True, slots=True)
class Row:
    """One disk between two looks. `history`: mean latencies in ns, the latest last; None if nothing was timed."""

    known: Disk
    moved: Speed
    history: tuple[float | None, ...] = ()

    @property
    def in_flight(self) -> int:
        """The requests that are under way."""
        return self.known.counters["in_flight"]

    @property
    def condition(self) -> str:
        """The disk's condition in one word."""
        return pictures.condition(self.known)

    @property
    def text(self) -> str:
        """The text that a filter searches."""
        words = (self.known.vbd, self.known.guest, self.condition, self.known.chain)
        return printable(" ".join(words)).lower()


@dataclass(frozen=True, slots=True)
class View:
    """What the operator wants to see, and in which order."""

    sort: str = "disk"
    is_reversed: bool = False
    filter: str = ""
    with_layers: bool = False

    def next_sort(self, step: int = 1) -> View:
        """Return the view with the next sort order."""
        names = list(SORTS)
        return replace(self, sort=names[(names.index(self.sort) + step) % len(names)])


def _by_status(name: str) -> Callable[[Row], Any]:
    return lambda row: pictures.SORTS[name](row.known, row.moved)


SORTS: dict[str, Callable[[Row], Any]] = {name: _by_status(name) for name in pictures.SORTS} | {
    "queue": lambda row: -row.in_flight
}


class History:
    """Remembers the latencies of disks from look to look."""

    def __init__(self) -> None:
        self._last: Picture | None = None
        self._means: dict[str, deque[float | None]] = {}

    def take(self, picture: Picture) -> list[Row]:
        """Return a row for each disk of a picture; at the first picture no speed is known."""
        moved = pictures.speeds(self._last or picture, picture)
        is_first, self._last = self._last is None, picture
        self._means = {each.node: self._means.get(each.node, deque(maxlen=REMEMBERED)) for each in picture.disks}
        if not is_first:
            for node, means in self._means.items():
                means.append(moved[node].mean_ns)
        return [Row(each, moved[each.node], tuple(self._means[each.node])) for each in picture.disks]


def arranged(rows: Iterable[Row], view: View) -> list[Row]:
    """Return the rows that a view shows, in its order."""
    found = [row for row in rows if view.filter.lower() in row.text]
    found.sort(key=lambda row: (SORTS[view.sort](row), SORTS["disk"](row)), reverse=view.is_reversed)
    return found


def sparkline(values: Sequence[float | None], width: int, bars: str = BARS) -> str:
    """Return the latest values as bars, the greatest as the tallest; a space for None."""
    shown = values[-width:] if width > 0 else ()
    most = max((each for each in shown if each is not None), default=0.0)
    last = len(bars) - 1
    return "".join(" " if each is None else bars[round(last * each / most) if most else 0] for each in shown).rjust(
        width
    )


def layers(row: Row) -> list[str]:
    """Return a line for each layer: its text and its figures."""
    lines = []
    for each in row.known.layers:
        figures = ", ".join(f"{name} {value}" for name, value in each.figures.items())
        lines.append(printable(each.layer) + (f"  [{printable(figures)}]" if figures else ""))
    return lines


def values(row: Row) -> dict[str, Any]:
    """Return the values of a row for --json."""
    known, moved = row.known, row.moved
    rates = {f"{name}_per_s": None if moved.rates is None else round(moved.rates[name], 3) for name in pictures.RATES}
    figures = [{"layer": each.layer, "figures": each.figures} for each in known.layers]
    return {
        "vbd": known.vbd,
        "guest": known.guest,
        "condition": row.condition,
        "chain": known.chain,
        **rates,
        "mean_ns": None if moved.mean_ns is None else round(moved.mean_ns),
        "p99_ns": moved.p99_ns,
        "in_flight": row.in_flight,
        "errors": pictures.errors(known),
        "layers": figures,
    }
