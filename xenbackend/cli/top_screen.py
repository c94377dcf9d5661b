"""The picture of `xenbackend top`: exactly as many lines as the terminal has, and none wider, whatever its size.

Must not ask anybody, nor know a terminal: it is given the size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenbackend.cli import pictures, top_rows
from xenbackend.cli.top_rows import Row, View
from xenbackend.errors import printable
from xenbackend.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.text import Text

KEYS = "q quit  s S sort  r reverse  / filter  l layers  space hold  + - interval  arrows scroll  ? keys"
_STYLES = {"Connected": "green", "paused": "yellow"}
_SPARK = 16  # columns
_LEAST_CHAIN = 12


@dataclass(frozen=True, slots=True)
class Frame:
    """What is to be shown: the rows in order, the first one that is visible, and the lines above and below.

    typing   the filter while it is being typed, else None
    note     about an error, or the effect of a key
    """

    rows: Sequence[Row]
    view: View
    service: str
    first: int = 0
    note: str = ""
    typing: str | None = None
    with_keys: bool = False
    bars: str = top_rows.BARS


@dataclass(frozen=True, slots=True)
class _Column:
    """One column; the greater its rank, the sooner it is left out if there is no room."""

    heading: str
    width: int
    rank: int
    cell: Callable[[Row], str]
    is_right: bool = True


def _rate(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if row.moved.rates is None:
            return "-"
        rate = row.moved.rates[name]
        return format_size(int(rate)).replace("iB", "").replace(" ", "") if name.endswith("bytes") else f"{rate:.0f}"

    return cell


def _time(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else format_duration(nanoseconds / 1e9).replace(" ", "")


def _columns(bars: str) -> list[_Column]:
    return [
        _Column("disk", 9, 0, lambda row: row.known.vbd, is_right=False),
        _Column("guest", 12, 6, lambda row: printable(row.known.guest) or "-", is_right=False),
        _Column("state", 12, 1, lambda row: row.condition, is_right=False),
        _Column("r/s", 6, 3, _rate("reads")),
        _Column("w/s", 6, 3, _rate("writes")),
        _Column("rB/s", 7, 5, _rate("read_bytes")),
        _Column("wB/s", 7, 5, _rate("written_bytes")),
        _Column("queue", 5, 4, lambda row: str(row.in_flight)),
        _Column("mean", 7, 2, lambda row: _time(row.moved.mean_ns)),
        _Column("99%<", 7, 7, lambda row: _time(row.moved.p99_ns)),
        _Column("latency", _SPARK, 8, lambda row: top_rows.sparkline(row.history, _SPARK, bars)),
        _Column("errors", 6, 9, lambda row: str(pictures.errors(row.known))),
    ]


def lines(frame: Frame, width: int, height: int) -> list[Text]:
    """Return `height` lines, none of them wider than `width` columns."""
    from rich.text import Text

    columns = _fitting(_columns(frame.bars), width)
    head, foot = _head(frame, columns, width), _foot(frame)
    body = [line for row in frame.rows[frame.first :] for line in _of_row(row, columns, frame.view)]
    if not frame.rows:
        body = [Text("no disk matches the filter" if frame.view.filter else "no disk is in service", "dim")]
    room = max(0, height - len(head) - len(foot))
    empty = [Text("")] * max(0, room - len(body))
    found = [*head, *body[:room], *empty, *foot][:height]
    for line in found:
        line.truncate(width, overflow="crop")
        line.no_wrap = True
    return found


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """Return the columns that there is room for, leaving some for the chain if that is possible at all."""
    while len(columns) > 1 and _width(columns) > max(0, width - _LEAST_CHAIN):
        columns.remove(max(columns, key=lambda each: each.rank))
        if len(columns) <= 2 and _width(columns) <= width:
            break
    return columns


def _width(columns: Sequence[_Column]) -> int:
    return sum(each.width + 1 for each in columns)


def _head(frame: Frame, columns: Sequence[_Column], width: int) -> list[Text]:
    from rich.text import Text

    order = f"by {frame.view.sort}{', reversed' if frame.view.is_reversed else ''}"
    some = f", {len(frame.rows)} that have {frame.view.filter!r}" if frame.view.filter else ""
    above = Text(f"{frame.service}; {order}{some}", "bold")
    words = [each.heading.rjust(each.width) if each.is_right else each.heading.ljust(each.width) for each in columns]
    return [above, Text(" ".join([*words, "chain"]).ljust(width), "reverse")]


def _of_row(row: Row, columns: Sequence[_Column], view: View) -> list[Text]:
    """Return the line of a disk, a remark about it, and its layers if they are wanted."""
    from rich.cells import set_cell_size
    from rich.text import Text

    line = Text()
    for each in columns:
        word = each.cell(row)
        word = word.rjust(each.width) if each.is_right else word
        style = _STYLES.get(row.condition, "red") if each.heading == "state" else ""
        line.append(set_cell_size(word, each.width), style).append(" ")
    line.append(printable(row.known.chain))
    below = [Text(f"    {each}", "dim") for each in top_rows.layers(row)] if view.with_layers else []
    if row.known.reason or row.known.paused:
        below.insert(0, Text(f"    {next(iter(pictures.remarks(row.known)), '')}", "yellow"))
    return [line, *below]


def _foot(frame: Frame) -> list[Text]:
    from rich.text import Text

    if frame.typing is not None:
        return [Text(f"filter: {printable(frame.typing)}_", "bold")]
    if frame.note:
        return [Text(printable(frame.note), "bold red")]
    return [Text(KEYS, "dim")] if frame.with_keys else []
