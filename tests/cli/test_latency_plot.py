"""A histogram as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.answering import typed_disk
from xenbackend.cli.histogram import Histogram
from xenbackend.errors import ConfigError

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [(0,) * 48, (0,) * 17 + (5, 3) + (0,) * 29])
def test_a_picture(tmp_path: Path, buckets: tuple[int, ...]) -> None:
    """The picture has the format of its file name, even without samples, and with special characters in the chain."""
    from xenbackend.cli.latency_plot import save

    save(typed_disk(chain="aio:/$a$\\b_{"), Histogram(buckets, 800_000, 2.0), tmp_path / "x.png")
    save(typed_disk(), Histogram(buckets, 800_000, None), tmp_path / "x.svg")

    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "5/xvda" in (tmp_path / "x.svg").read_text() or (tmp_path / "x.svg").stat().st_size > 1000
    with pytest.raises(ConfigError, match="cannot be written"):
        save(typed_disk(), Histogram(buckets, 0, None), tmp_path / "none" / "x.png")
