"""Log lines about one vbd."""

from __future__ import annotations

import io

import pytest

from tests import figures
from tests.supervisor.helpers import PATH
from xenbackend.supervisor.vbd.vbd_log import PER_HOUR, VbdLog

as_json = pytest.mark.parametrize("lines", ["json"], indirect=True)


@as_json
def test_a_line_names_its_vbd(lines: io.StringIO) -> None:
    """A line has its level, vbd and fields; fields that a worker sends cannot replace our own."""
    VbdLog(PATH, lambda: 0.0).say("warning", "something is odd", ring="0", vbd="vbd/6/1", component="kernel")
    [line] = lines.getvalue().splitlines()

    for part in ('"5/xvda"', '"something is odd"', '"ring"', '"warning"', '"supervisor"'):
        assert part in line
    assert "vbd/6/1" not in line
    assert "kernel" not in line


@as_json
def test_what_a_guest_provokes_is_bounded_and_counted(lines: io.StringIO) -> None:
    """Lines beyond the budget are not written; the next line that is written has their number."""
    now = 0.0
    vbd_log = VbdLog(PATH, lambda: now)
    for _ in range(1000):
        vbd_log.say("info", "again")
    written = len(lines.getvalue().splitlines())
    now = 1000.0
    vbd_log.say("info", "later")

    assert 50 < written < 200
    assert f'"{1000 - written}"' in lines.getvalue().splitlines()[-1]


@pytest.mark.parametrize("lines", ["json", "journal", "console"], indirect=True)
@pytest.mark.parametrize(
    "text", ["\x1b" * 4000, "\U0001f600" * 4000, "\udcff" * 4000, "'\\ " * 2000, "x", "\0\n" * 900]
)
@pytest.mark.rows("R13", "A30")
def test_no_hour_has_more_bytes_than_its_share(lines: io.StringIO, text: str) -> None:
    """R13, B7: whatever a guest and its hostile worker say for three hours, at most 64 KiB are written in any hour,
    counted after escaping, and some lines are always written.
    """
    now = 0.0
    vbd_log = VbdLog(PATH, lambda: now)
    at = [0]
    for minute in range(180):
        now = 60.0 * minute
        for _ in range(50):
            vbd_log.say_for_worker("critical", text, unsaid=text)
            vbd_log.say("error", text, reason=text)
        at.append(len(lines.getvalue().encode()))

    hours = [after - before for before, after in zip(at, at[60:], strict=False)]
    assert max(hours) <= PER_HOUR
    assert min(hours) > PER_HOUR // 8
    figures.add("log of an hour", max(hours) / 1024)


@as_json
def test_a_worker_does_not_silence_us(lines: io.StringIO) -> None:
    """Our own lines about a worker are written, however much it has said. An unknown level becomes a warning."""
    vbd_log = VbdLog(PATH, lambda: 0.0)
    for _ in range(10_000):
        vbd_log.say_for_worker("msg", "it is I")
    vbd_log.say("critical", "it is not")

    assert '"warning"' in lines.getvalue().splitlines()[0]
    assert '"it is not"' in lines.getvalue().splitlines()[-1]
