"""Looking for work before sleeping: only as long as it pays."""

from __future__ import annotations

import mmap

import pytest

from xenbackend.blkif.abi import REQ_PROD, X86_64, ring_entries
from xenbackend.blkif.ring import BackRing
from xenbackend.worker.polling import Poller


class Clock:
    """A clock that goes on by one with every look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        """Return the time."""
        self.now += 1
        return self.now


def make_ring() -> tuple[BackRing, memoryview]:
    """Return an empty ring and its index words."""
    pages = memoryview(mmap.mmap(-1, 4096))
    return BackRing(pages, X86_64, ring_entries(X86_64, 0), lambda: None), pages.cast("I")


def test_work_is_found_at_once() -> None:
    """A request that is there ends the look after one glance."""
    ring, words = make_ring()
    words[REQ_PROD] = 1
    clock = Clock()

    assert Poller(100, clock).finds_work(ring, []) is True
    assert clock.now <= 2


def test_a_look_ends_with_its_time() -> None:
    """Nothing is found in an empty ring, and no longer than the duration is spent on it."""
    ring, _ = make_ring()
    clock = Clock()

    assert Poller(100, clock).finds_work(ring, []) is False
    assert 100 <= clock.now <= 102


@pytest.mark.parametrize("own", [0, 1])
def test_another_ring_ends_the_look(own: int) -> None:
    """Work in another ring is not kept waiting, not even by work in this one: the loop hears of it by its event."""
    ring, own_words = make_ring()
    own_words[REQ_PROD] = own
    other, words = make_ring()
    words[REQ_PROD] = 1
    clock = Clock()

    assert Poller(1000, clock).finds_work(ring, [other]) is False
    assert clock.now <= 3


@pytest.mark.parametrize("forbidden", ["host is busy", "switched off"])
def test_no_look_where_it_is_not_wanted(forbidden: str) -> None:
    """Without an idle CPU, or with a duration of zero, not even the clock is read."""
    ring, words = make_ring()
    words[REQ_PROD] = 1
    clock = Clock()
    poller = Poller(0 if forbidden == "switched off" else 100, clock)
    poller.is_allowed = forbidden != "host is busy"

    assert poller.finds_work(ring, []) is False
    assert clock.now == 0


def test_looks_in_vain_are_given_up_for_a_while() -> None:
    """After eight looks in vain the next 256 sleeps are not delayed; then it is tried again."""
    ring, _ = make_ring()
    clock = Clock()
    poller = Poller(10, clock)
    for _ in range(8):
        poller.finds_work(ring, [])
    spent = clock.now
    for _ in range(256):
        poller.finds_work(ring, [])
    assert clock.now == spent
    poller.finds_work(ring, [])

    assert clock.now > spent


def test_success_forgives_what_was_in_vain() -> None:
    """Looks that pay now and then go on: only failures in a row count."""
    ring, words = make_ring()
    clock = Clock()
    poller = Poller(10, clock)
    for _ in range(20):
        words[REQ_PROD] = 0
        for _ in range(7):
            poller.finds_work(ring, [])
        words[REQ_PROD] = 1

        assert poller.finds_work(ring, []) is True
