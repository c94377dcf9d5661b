"""Tests of `xenbackend.supervisor.vbd.lives`."""

from __future__ import annotations

from xenbackend.supervisor.vbd.lives import LONG_S, Lives


def test_a_worker_dies_in_vain_if_its_guest_got_nothing() -> None:
    """An answer to the guest, or a long life, is progress; neither is none."""
    lives = Lives([3])
    lives.start(10.0)
    nothing = lives.end(11.0, [3])
    lives.start(12.0)
    answered = lives.end(13.0, [4])
    lives.start(14.0)
    long = lives.end(15.0 + LONG_S, [4])

    assert (False, True, True) == (nothing, answered, long)


def test_one_that_was_asked_to_end_has_not_died() -> None:
    """Only a death counts as one, until there is a successor."""
    lives = Lives([])
    died = []
    for was_asked in (True, False):
        lives.start(1.0)
        lives.end(2.0, [], was_asked=was_asked)
        died.append(lives.has_died)
    lives.start(3.0)

    assert [False, True, False] == [*died, lives.has_died]


def test_the_time_that_a_guest_waits_counts_from_the_first_of_several_deaths() -> None:
    """Workers that die one after the other without serving leave it waiting all the while."""
    lives = Lives([])
    lives.start(1.0)
    lives.end(2.0, [])
    lives.start(3.0)
    lives.end(4.0, [])

    assert 2.0 == lives.ended
