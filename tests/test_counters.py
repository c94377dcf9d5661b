"""Tests of `xenbackend.counters`: the page that a worker fills and others read."""

from __future__ import annotations

import mmap
from array import array

import pytest

from xenbackend.counters import (
    BUCKETS,
    BY_OPERATION,
    FIGURES,
    HISTOGRAM,
    INDEX,
    MOST_FIGURES,
    NAMES,
    SIZE,
    by_operation,
    figures,
    histogram,
    percentile_ns,
    snapshot,
)


def page_with(buckets: dict[int, int]) -> memoryview:
    """Return a page with these counts in buckets of the histogram."""
    page = memoryview(bytearray(SIZE))
    words = page.cast("Q")
    for bucket, count in buckets.items():
        words[HISTOGRAM + bucket] = count
    return page


def test_layout_fits_its_page() -> None:
    """Counters and histogram lie in the page one after the other, without overlap."""
    assert len(NAMES) == len(set(NAMES)) <= HISTOGRAM
    assert HISTOGRAM + BUCKETS <= SIZE // 8
    assert list(range(len(NAMES))) == [INDEX[name] for name in NAMES]


def test_snapshot_reads_words_by_name() -> None:
    """Each counter is the 64-bit word at its place, up to the largest value; the rest of a longer memory is ignored."""
    page = memoryview(bytearray(SIZE + 4096))
    words = page.cast("Q")
    for name, place in INDEX.items():
        words[place] = 2**64 - 1 - place if name != "turns" else 0
    found = snapshot(page)

    assert list(NAMES) == list(found)
    assert {name: 2**64 - 1 - place for name, place in INDEX.items() if name != "turns"} | {"turns": 0} == found


def test_snapshot_of_shared_memory() -> None:
    """Another process sees the counters through its own mapping of the same memory."""
    with mmap.mmap(-1, SIZE) as shared, memoryview(shared) as page:
        with page.cast("Q") as words:
            words[INDEX["reads"]] = 7

        assert 7 == snapshot(page)["reads"]


@pytest.mark.parametrize(
    ("buckets", "fraction", "expected"),
    [
        ({}, 0.5, 0),
        ({10: 1}, 0.5, 1024),
        ({10: 1}, 1.0, 1024),
        ({10: 1}, 0.0, 1024),
        ({10: 99, 20: 1}, 0.99, 1 << 10),
        ({10: 98, 20: 2}, 0.99, 1 << 20),
        ({10: 50, 12: 50}, 0.5, 1 << 10),
        ({0: 5}, 0.5, 1),
        ({BUCKETS - 1: 1}, 0.5, 1 << (BUCKETS - 1)),
        ({3: 2**60, 4: 1}, 0.5, 8),
        ({3: 2**60 - 1, 4: 2**10}, 1.0, 16),
        ({3: 2**53 + 3}, 1.0, 8),  # as a float it would be larger
    ],
)
def test_percentiles(buckets: dict[int, int], fraction: float, expected: int) -> None:
    """A percentile is the upper bound of the bucket into which it falls, and 0 without samples."""
    assert expected == percentile_ns(histogram(page_with(buckets)), fraction)


def test_any_words_are_counters() -> None:
    """Whatever a worker has written there, each counter has its name and fits into 64 bits, and nothing is raised."""
    page = memoryview(bytearray(b"\xff" * SIZE))

    assert {2**64 - 1} == set(snapshot(page).values())
    assert [1 << BUCKETS - 1, 1] == [percentile_ns(histogram(page), fraction) for fraction in (1.0, 0.0)]


def test_buckets_are_powers_of_two() -> None:
    """A sample of n ns counts in bucket n.bit_length(), so its percentile is above n and at most twice n."""
    for sample in (1, 2, 3, 1000, 1023, 1024, 10**9):
        bound = percentile_ns(histogram(page_with({sample.bit_length(): 1})), 0.5)

        assert sample < bound <= 2 * sample


def test_each_operation_has_its_own_words() -> None:
    """The words of operations are at the end of the page, behind the layers' figures."""
    page = memoryview(bytearray(SIZE))
    words = page.cast("Q")
    words[BY_OPERATION], words[BY_OPERATION + 1 + 17], words[SIZE // 8 - 1] = 9, 3, 5
    found = by_operation(page)

    assert FIGURES + MOST_FIGURES == BY_OPERATION
    assert (9, 3) == (found["read"]["sum_ns"], found["read"]["buckets"][17])
    assert (0, 5, BUCKETS) == (
        found["write"]["sum_ns"],
        found["discard"]["buckets"][-1],
        len(found["flush"]["buckets"]),
    )


def test_what_layers_count_lies_behind_the_histogram() -> None:
    """Each layer's figures follow those of the layer above, by its own names; those beyond the room are left out."""
    page = memoryview(bytearray(SIZE))
    page.cast("Q")[FIGURES : FIGURES + 3] = memoryview(array("Q", [7, 0, (1 << 64) - 1]))

    assert FIGURES == HISTOGRAM + BUCKETS
    found = figures(page, [["waiting", "held"], [], ["hits"]])
    assert [{"waiting": 7, "held": 0}, {}, {"hits": (1 << 64) - 1}] == found
    many = figures(page, [[str(number) for number in range(10_000)]])
    assert MOST_FIGURES == len(many[0])
