"""What happened to a disk between two looks at the service, and how it is shown."""

from __future__ import annotations

from copy import deepcopy

from tests.answering import DISK, moved, typed_disk
from xenbackend.cli import pictures
from xenbackend.cli.histogram import difference
from xenbackend.cli.pictures import Speed, speed


def test_rates_and_latency_are_of_the_interval() -> None:
    """Only what happened between two looks counts; a bound is that of a bucket."""
    told = moved(deepcopy(DISK), reads=10**6, latency_samples=10**6, latency_ns=10**15)
    later = moved(told, reads=100, writes=20, read_bytes=8192, latency_samples=4, latency_ns=400_000)
    before, after = typed_disk(told), typed_disk(later)

    assert Speed({"reads": 50.0, "writes": 10.0, "read_bytes": 4096.0, "written_bytes": 0.0}, 100_000.0, 1 << 17) == (
        speed(before, after, 2.0)
    )
    assert Speed(dict.fromkeys(pictures.RATES, 0.0)) == speed(after, after, 2.0)


def test_counters_that_began_anew_are_no_rate() -> None:
    """A disk that was attached again, has no worker, or was not seen before, has no rate, and never a negative one."""
    known = typed_disk(moved(deepcopy(DISK), reads=100))

    assert {Speed()} == {
        speed(None, known, 1.0), speed(known, typed_disk(), 1.0), speed(known, known, 0.0),
        speed(known, typed_disk(counters={}, latency_histogram=[]), 1.0),
    }  # fmt: skip


def test_another_release_may_count_more() -> None:
    """A service of another release may be started between two looks; counters that only one has do not matter."""
    old = typed_disk(moved(deepcopy(DISK), reads=100))
    told = moved(deepcopy(DISK), reads=110, latency_samples=4, latency_ns=400_000)
    told["counters"]["more"] = 5
    told["latency_histogram"].append(0)
    new = typed_disk(told)

    assert 10.0 == (speed(old, new, 1.0).rates or {})["reads"]
    assert 4 == difference(old, new, 1.0).samples
    assert Speed() == speed(new, old, 1.0)


def test_an_age_is_one_word() -> None:
    """An age is shown in the largest unit that fits; an unknown one as a dash."""
    assert ["0s", "59s", "2m", "3h", "4d", "-"] == [
        pictures.age(1000.0 - each if each is not None else None, 1000.0)
        for each in (0, 59, 120, 3 * 3600, 4 * 86400, None)
    ]
