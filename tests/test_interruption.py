"""Long runs that somebody ends: `tests/interruption.py`, and who uses it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from tests.chaos import __main__ as chaos
from tests.interruption import INTERRUPTED, heard_once
from tests.soak import __main__ as soak


def interrupt() -> None:
    """Send this process what Ctrl-C sends."""
    os.kill(os.getpid(), signal.SIGINT)


def test_what_is_being_ended_is_not_interrupted_again() -> None:
    """The first SIGINT raises; those that come while it is tidied up do nothing; the former handler comes back."""
    former, done = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with heard_once():
            try:
                interrupt()
                done.append("went on")
            finally:
                interrupt()
                done.append("tidied up")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert ["tidied up"] == done
    assert former is signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("main", [chaos.main, soak.main])
def test_an_interrupted_run_is_a_sentence_and_no_figure(
    main: Callable[[Sequence[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody sees a traceback, and no file of figures tells of a run that was not ended."""

    def run(*_: object) -> NoReturn:
        interrupt()
        raise AssertionError("it went on")

    for module in (chaos, soak):
        monkeypatch.setattr(module, "run", run)
    figures = tmp_path / "figures.json"
    figures.write_text("of a run before")

    assert INTERRUPTED == main(["--json", str(figures)])
    assert "interrupted: a run that is not over has no figures\n" == capsys.readouterr().out
    assert not figures.exists()
