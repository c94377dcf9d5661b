"""A budget."""

from __future__ import annotations

from xenbackend.budget import Bucket


def test_a_burst_goes_through_and_then_one_per_interval() -> None:
    """R13: events beyond the burst are refused until time has passed; the next one allowed gets the number refused."""
    time = 0.0
    bucket = Bucket(3, 10.0, lambda: time)

    assert [0, 0, 0, None, None] == [bucket.take() for _ in range(5)]
    time = 10.0
    assert [2, None] == [bucket.take() for _ in range(2)]
    time = 30.0
    assert [1, 0, None] == [bucket.take() for _ in range(3)]


def test_a_bucket_is_never_fuller_than_full() -> None:
    """However long no event came, at most one burst passes at once."""
    time = 0.0
    bucket = Bucket(2, 1.0, lambda: time)
    time = 1e6

    assert [0, 0, None] == [bucket.take() for _ in range(3)]


def test_what_cost_more_is_paid_off_first() -> None:
    """If one event turns out to cost as much as five, the next one has to wait for the time of five."""
    time = 0.0
    bucket = Bucket(3, 1.0, lambda: time)
    assert bucket.take() == 0
    bucket.spend(4)
    assert bucket.take() is None
    time = 2.9
    assert bucket.take() is None
    time = 3.1
    assert bucket.take() == 2
