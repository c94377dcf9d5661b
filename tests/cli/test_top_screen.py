"""The screen of the live view: it fits into any terminal."""

from __future__ import annotations

import pytest

from tests.answering import typed_disk
from xenbackend.cli import top_rows, top_screen
from xenbackend.cli.pictures import Speed
from xenbackend.cli.top_rows import Row, View
from xenbackend.cli.top_screen import Frame, lines

MOVED = Speed({"reads": 123.4, "writes": 5.0, "read_bytes": 4.5e6, "written_bytes": 0.0}, 262_000.0, 1 << 19)
ROWS = [Row(typed_disk(vbd=f"{domid}/xvda", guest="\x1b[2J漢字" * 5), MOVED, (1e5, 2e5)) for domid in range(40)]


def shown(frame: Frame, width: int = 160, height: int = 12) -> list[str]:
    """Return the lines as text."""
    return [line.plain for line in lines(frame, width, height)]


def test_a_picture() -> None:
    """A row has rates, queue, latency, its history and the chain; the first line has the service and the sort order."""
    above, heading, first, *_, last = shown(Frame(ROWS, View(sort="reads"), "service 0.1.0", with_keys=True), 200)

    assert "service 0.1.0; by reads" == above
    assert ["disk", "guest", "state", "r/s", "w/s", "rB/s", "wB/s", "queue", "mean", "99%<", "latency", "errors",
            "chain"] == heading.split()  # fmt: skip
    for word in ("0/xvda", r"\x1b[2J", "Connected", "123", "4.292M", "262us", "524us", "▅█", "log:|aio:/img"):
        assert word in first
    assert last.startswith("q quit")


@pytest.mark.parametrize("height", [1, 2, 3, 5, 24, 100])
@pytest.mark.parametrize("width", [1, 5, 20, 40, 80, 132])
def test_it_fits_into_any_terminal(width: int, height: int) -> None:
    """The screen has exactly the terminal's lines, none wider than the terminal, whatever guests are called."""
    found = lines(
        Frame(ROWS, View(with_layers=True), "service", note="a note that is long", typing=None), width, height
    )

    assert height == len(found)
    assert all(line.cell_len <= width for line in found)


def test_what_matters_most_stays_in_a_narrow_one() -> None:
    """In 20 columns a disk's name is shown, in 40 its state too."""
    assert "0/xvda" in shown(Frame(ROWS, View(), "s"), 20, 5)[2]
    assert "Connected" in shown(Frame(ROWS, View(), "s"), 40, 5)[2]


def test_what_is_wrong_stands_below_its_disk() -> None:
    """Below a disk's row come the sentence if it is not served, and on request each layer with its figures."""
    layer = {"layer": "throttle:iops=1", "figures": {"held": 7}}
    known = typed_disk(reason="storage", error="it does not answer", layers=[layer])
    _, _, row, why, layer, *_ = shown(Frame([Row(known, Speed())], View(with_layers=True), "s"))

    assert "storage" in row
    assert ("it does not answer", "throttle:iops=1  [held 7]") == (why.strip(), layer.strip())
    assert "-" in row.split()


def test_scrolling_filter_and_notes() -> None:
    """The rows begin at the scroll position; the last line shows the filter being typed, or an error."""
    assert "7/xvda" in shown(Frame(ROWS, View(), "s", first=7))[2]
    assert "filter: ma_" == shown(Frame(ROWS, View(), "s", typing="ma"))[-1]
    assert r"no\x1b" == shown(Frame(ROWS, View(), "s", note="no\x1b"))[-1]
    assert "no disk matches the filter" == shown(Frame([], View(filter="x"), "s"))[2]
    assert "no disk is in service" == shown(Frame([], View(), "s"))[2]
    assert "▅" not in "".join(shown(Frame(ROWS, View(), "s", bars=top_rows.PLAIN_BARS), 200))
    assert top_screen.KEYS in shown(Frame(ROWS, View(), "s", with_keys=True), 200)[-1]
