"""The lines about one vbd."""

from __future__ import annotations

import io

import pytest

from tests.supervisor.helpers import PATH
from xenbackend.supervisor.vbd.vbd_log import VbdLog

pytestmark = pytest.mark.parametrize("lines", ["json"], indirect=True)


def test_a_line_names_its_vbd(lines: io.StringIO) -> None:
    """Level, vbd and fields are in the line; a worker's fields stand in for none of our own."""
    VbdLog(PATH, lambda: 0.0).say("warning", "something is odd", ring="0", vbd="vbd/6/1", component="kernel")
    [line] = lines.getvalue().splitlines()

    for part in ('"5/xvda"', '"something is odd"', '"ring"', '"warning"', '"supervisor"'):
        assert part in line
    assert "vbd/6/1" not in line
    assert "kernel" not in line


def test_what_a_guest_provokes_is_bounded_and_counted(lines: io.StringIO) -> None:
    """Beyond the budget nothing is written, and how much that was stands in the next line that is."""
    now = 0.0
    vbd_log = VbdLog(PATH, lambda: now)
    for _ in range(1000):
        vbd_log.say("info", "again")
    written = len(lines.getvalue().splitlines())
    now = 1000.0
    vbd_log.say("info", "later")

    assert 10 < written < 60
    assert f'"{1000 - written}"' in lines.getvalue().splitlines()[-1]
