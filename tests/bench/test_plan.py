"""The workloads, the places of their requests, and the stamps."""

from __future__ import annotations

from array import array

import pytest

from xenbackend.bench.plan import SMALLEST, WORKS, Sample, Work, half, percentiles, places, select_works, stamp
from xenbackend.errors import ConfigError
from xenbackend.units import SECTOR


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_places_stay_in_their_half(work: Work) -> None:
    """Every request lies in its workload's half of the disk, so that no write destroys the stamps that reads check."""
    size = SMALLEST + SMALLEST // 3
    start, length = half(work, size)

    for place in places(work, size):
        assert start <= place * SECTOR
        assert place * SECTOR + work.length <= start + length <= size
        assert place % (work.length // SECTOR) == 0


def test_halves_do_not_meet() -> None:
    """The half that is written begins no earlier than the half that is read ends."""
    read = next(work for work in WORKS if not work.write)
    write = next(work for work in WORKS if work.write)
    first, length = half(read, SMALLEST)

    assert half(write, SMALLEST)[0] >= first + length


def test_requests_in_flight_have_different_places() -> None:
    """Places repeat only after at least as many others as are in flight."""
    for work in WORKS:
        order = places(work, SMALLEST)

        assert len(set(order)) == len(order) >= work.depth


def test_places_are_the_same_every_time() -> None:
    """Every target and every session visits the same places in the same order."""
    for work in WORKS:
        assert places(work, SMALLEST) == places(work, SMALLEST)


def test_a_small_disk_is_refused() -> None:
    """A disk on which requests in flight would overlap is refused."""
    with pytest.raises(ConfigError, match="too small"):
        places(WORKS[0], SMALLEST - 1)


def test_every_sector_is_stamped_with_its_number() -> None:
    """Each sector's first eight bytes are its number, and the rest is unchanged."""
    buffer = bytearray(b"\xff" * (3 * SECTOR))
    stamp(buffer, 7)

    assert array("Q", [7, 8, 9]).tobytes() == b"".join(buffer[at : at + 8] for at in range(0, len(buffer), SECTOR))
    assert b"\xff" * (SECTOR - 8) == buffer[8:SECTOR]


def test_percentiles_are_values_that_were_measured() -> None:
    """The 50th, 99th and 99.9th percentile of a thousand samples are the 501st, 991st and 1000th."""
    assert (501, 991, 1000) == percentiles(array("Q", range(1000, 0, -1)))
    assert (5, 5, 5) == percentiles(array("Q", [5]))


def test_select_works() -> None:
    """Workloads are selected by name, in their usual order; a read-only disk gets no writes."""
    assert ["rr4k", "sw1m"] == [work.name for work in select_works(["sw1m", "rr4k"], read_only=False)]
    assert not any(work.write for work in select_works([], read_only=True))
    with pytest.raises(ConfigError, match="'rr5k' is not a workload"):
        select_works(["rr5k"], read_only=False)
    with pytest.raises(ConfigError, match="this disk is read-only"):
        select_works(["rw4k"], read_only=True)


def test_first_writes_need_an_image() -> None:
    """First writes need an image that can be created anew; asking for them without one says how."""
    assert not any(work.fresh for work in select_works([], read_only=False))
    assert ["fw4k", "fw64k"] == [work.name for work in select_works([], read_only=False, image=True) if work.fresh]
    with pytest.raises(ConfigError, match="with --image"):
        select_works(["fw4k"], read_only=False)


def test_figures_of_a_sample() -> None:
    """Rates are per second and CPU time per request in microseconds."""
    sample = Sample(requests=1000, seconds=0.5, backend_cpu=0.25, client_busy=0.1, p50=1, p99=2, p999=3)

    assert (2000.0, 250.0) == (sample.rate, sample.cpu_us)
