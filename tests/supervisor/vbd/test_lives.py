"""Tests of `xenbackend.supervisor.vbd.lives`."""

from __future__ import annotations

from xenbackend.supervisor.vbd.lives import LONG_S, SHORT_S, TRUSTED_S, Lives


def test_a_worker_dies_in_vain_if_its_guest_got_nothing() -> None:
    """A worker made progress if it answered its guest or lived long; else it died in vain."""
    lives = Lives([3])
    lives.start(10.0)
    nothing = lives.end(11.0, [3])
    lives.start(12.0)
    answered = lives.end(13.0, [4])
    lives.start(14.0)
    long = lives.end(15.0 + LONG_S, [4])

    assert (False, True, True) == (nothing, answered, long)


def test_one_that_was_asked_to_end_has_not_died() -> None:
    """Only an end that was not asked for counts as a death, until there is a successor."""
    lives = Lives([])
    died = []
    for was_asked in (True, False):
        lives.start(1.0)
        lives.end(2.0, [], was_asked=was_asked)
        died.append(lives.has_died)
    lives.start(3.0)

    assert [False, True, False] == [*died, lives.has_died]


def test_the_time_that_a_guest_waits_counts_from_the_first_of_several_deaths() -> None:
    """If workers die one after the other without serving, the guest has waited since the first death."""
    lives = Lives([])
    lives.start(1.0)
    lives.end(2.0, [])
    lives.start(3.0)
    lives.end(4.0, [])

    assert 2.0 == lives.ended


def test_one_that_broke_the_protocol_is_not_believed() -> None:
    """After a breach only a long life by our own clock counts as progress, as the worker may have written any into the
    journal.
    """
    lives, found = Lives([0]), []
    for number, life_s in enumerate((0.5, LONG_S + 1, TRUSTED_S + 1), 1):
        lives.start(10.0)
        found.append(lives.end(10.0 + life_s, [number], is_breach=True))

    assert [False, False, True] == found


def test_many_short_lives_one_after_the_other_are_hasty() -> None:
    """Many short lives in a row are hasty, even with progress, since such workers would keep the host busy, until one
    lives longer.
    """
    lives, found = Lives([0]), []
    for number, life_s in enumerate([SHORT_S / 2] * 12 + [SHORT_S, SHORT_S / 2], 1):
        lives.start(10.0)
        assert lives.end(10.0 + life_s, [number])
        found.append(lives.is_hasty)

    assert [*[False] * 10, True, True, False, False] == found


def test_one_that_ended_as_it_was_asked_was_not_hasty() -> None:
    """Workers that an administrator replaces are never hasty, however often that happens."""
    lives = Lives([0])
    for number in range(20):
        lives.start(10.0)
        lives.end(10.1, [number], was_asked=True)

    assert not lives.is_hasty
