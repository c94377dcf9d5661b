"""Findings as lines."""

from __future__ import annotations

import io

import pytest

from xenbackend.cli.doctor_text import lines, wants_color
from xenbackend.doctor.finding import ok, unknown, wrong

FOUND = [ok("xen", "it is one"), wrong("aio", "too few\x1b[2J", "sysctl -w x"), unknown("file", "dark", disk="5/xvda")]


def test_what_is_well_is_only_counted() -> None:
    """Each finding is a sentence with its command below it; findings that are well are counted, or shown on request."""
    shown = list(lines(FOUND, with_ok=False, is_colored=False))

    assert [
        r"wrong    aio: too few\x1b[2J",
        "         -> sysctl -w x",
        "unknown  5/xvda file: dark",
        "1 of 3 checks found nothing wrong, 1 something wrong, 1 could not be made",
    ] == shown
    assert "ok       xen: it is one" == next(lines(FOUND, with_ok=True, is_colored=False))
    assert ["1 of 1 checks found nothing wrong"] == list(lines(FOUND[:1], with_ok=False, is_colored=False))


def test_colors_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colors are used only on a terminal, and not if NO_COLOR is set."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31mwrong  \x1b[0m  aio" in "\n".join(lines(FOUND, with_ok=False, is_colored=True))
    assert (True, False) == (wants_color(Terminal()), wants_color(io.StringIO()))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal())
