"""The picture of a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from xenbackend.bench import plot
from xenbackend.bench.plan import WORKS, Sample
from xenbackend.bench.report import summarise
from xenbackend.bench.session import Measured
from xenbackend.errors import ConfigError, XenbackendError

ROWS = summarise(
    [
        Measured(work, name, [Sample(1000, 1, 1, 0, 1, 1, 1)] * 2)
        for work in WORKS[:2]
        for name in ("aio:{file}", "nbdkit")
    ]
)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the operator is told before anything is measured, and how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'xenbackend\[plot\]'"):
        plot.check()


@pytest.mark.slow
def test_a_picture(tmp_path: Path) -> None:
    """The rows become a PNG; a path that cannot be written, or with another ending, is refused with a sentence."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot.check()
    plot.save(ROWS, tmp_path / "picture.png")

    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    for path in (tmp_path / "no" / "picture.png", tmp_path / "picture.xyz"):
        with pytest.raises(ConfigError, match="cannot be written"):
            plot.save(ROWS, path)


@pytest.mark.slow
def test_a_full_file_system_is_no_mistake(tmp_path: Path) -> None:
    """If the file system is full, that is a failure, and not a mistake of the operator, who gets the reason."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "picture.png").symlink_to("/dev/full")
    with pytest.raises(XenbackendError, match=r"picture.png cannot be written: No space left on device$") as caught:
        plot.save(ROWS, tmp_path / "picture.png")

    assert not isinstance(caught.value, ConfigError)
