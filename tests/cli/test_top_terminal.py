"""Key sequences of a terminal; test_top.py has a real one."""

from __future__ import annotations

import pytest

from xenbackend.cli.top_terminal import check, split
from xenbackend.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("q", ["q"]), ("\x1b[A\x1bOB", ["up", "down"]), ("\x1b[5~\x1b[6~", ["page up", "page down"]),
        ("/ma\x7f\r", ["/", "m", "a", "backspace", "enter"]), ("\x1b", ["escape"]),
        ("\x1b[1;5Cq", ["q"]), ("\x1b[15~q", ["q"]), ("é", ["é"]), ("\x1b[", []),
    ],
)  # fmt: skip
def test_keys(typed: str, keys: list[str]) -> None:
    """Several keys in one read are separated, and an unknown key sequence is dropped as a whole."""
    assert keys == split(typed)


@pytest.mark.parametrize("kind", ["", "dumb", "unknown"])
def test_a_terminal_that_cannot_be_drawn_on(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On a terminal that cannot draw, as under cron, the error names `--once`."""
    monkeypatch.setenv("TERM", kind)
    with pytest.raises(ConfigError, match="--once"):
        check()
    monkeypatch.setenv("TERM", "xterm")
    check()
