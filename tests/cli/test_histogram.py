"""The latency histogram of an interval."""

from __future__ import annotations

import pytest

from tests.answering import typed_disk
from tests.cli.test_latency import timed
from xenbackend.cli.histogram import Histogram, difference
from xenbackend.errors import XenbackendError


def test_counting_that_began_anew_is_told() -> None:
    """If the counters were reset between two looks, the difference is refused with a sentence."""
    with pytest.raises(XenbackendError, match="attached again"):
        difference(typed_disk(timed(at17=5)), typed_disk(timed(at17=4, at18=9)), 1.0)


def test_bounds_are_those_of_buckets() -> None:
    """Each bound has the given fraction of the samples below it; empty buckets at both ends are left out."""
    found = difference(typed_disk(timed(at17=5)), typed_disk(timed(at17=95, at18=9, at20=1)), 2.0)

    assert (100, 100_000.0, range(17, 21)) == (found.samples, found.mean_ns, found.filled())
    assert [1 << 17, 1 << 18, 1 << 20] == [found.bound_ns(each) for each in (0.9, 0.99, 0.999)]
    assert Histogram((0,) * 48, 0, None).bound_ns(0.5) is None
