"""A histogram as text."""

from __future__ import annotations

from tests.answering import typed_disk
from xenbackend.cli.histogram import Histogram
from xenbackend.cli.latency_text import lines


def test_a_histogram() -> None:
    """Each bucket from the first to the last that is not empty has a line, the fullest the longest bar; sums follow."""
    buckets = [0] * 48
    buckets[17], buckets[19] = 90, 10
    head, first, middle, last, below = lines(typed_disk(chain="aio:/\x1b"), Histogram(tuple(buckets), 10**7, 2.0))

    assert r"5/xvda  aio:/\x1b" == head
    assert f"65.5 us to   131 us         90   90.0 %  {'#' * 40}" == first.strip()
    assert "131 us to   262 us          0    0.0 %" == middle.strip()
    assert last.endswith(" 10.0 %  #####")
    assert (
        "100 requests timed in 2.0 s: mean 100 us; 50 % < 131 us, 90 % < 131 us, 99 % < 524 us, 99.9 % < 524 us"
        == below
    )


def test_an_idle_disk() -> None:
    """For an idle disk a sentence says that nothing was timed."""
    assert "no request was timed since it was attached" == list(lines(typed_disk(), Histogram((0,) * 48, 0, None)))[-1]
