"""How many workers may die, and how long the next one rests."""

from __future__ import annotations

from xenbackend.supervisor.vbd.backoff import HASTY_S, REST_S, Backoff


def test_who_dies_in_vain_again_and_again_has_no_successor_in_the_end() -> None:
    """After the first death the next worker comes at once; each further pause is at least as long as the one before.
    After the last one there is no successor.
    """
    backoff = Backoff()
    rests = []
    for _ in REST_S:
        assert backoff.died(in_vain=True)
        rests.append(backoff.rest_s)

    assert [0.0, *sorted(rests[1:])] == rests
    assert (False, 7) == (backoff.died(in_vain=True), backoff.deaths)


def test_a_single_answer_to_the_guest_begins_the_count_anew() -> None:
    """After a worker that made progress the next one comes at once, however many died before."""
    backoff = Backoff()
    for _ in range(6):
        backoff.died(in_vain=True)

    assert (True, 0.0) == (backoff.died(in_vain=False), backoff.rest_s)


def test_hasty_deaths_are_followed_later_and_for_ever() -> None:
    """After hasty deaths the next worker comes later, whatever progress was reported; but they never end the series."""
    backoff = Backoff()

    assert [(True, HASTY_S)] * 20 == [(backoff.died(in_vain=False, is_hasty=True), backoff.rest_s) for _ in range(20)]


def test_to_serve_for_a_moment_does_not_begin_the_count_anew() -> None:
    """A worker that serves until it meets the request that kills it does not reset the count."""
    backoff = Backoff()
    for _ in range(6):
        backoff.died(in_vain=True)
        backoff.served()

    assert not backoff.died(in_vain=True)


def test_what_cannot_be_opened_is_tried_for_ever() -> None:
    """Failures to open make the pauses longer, up to the longest one, but never stop the tries; they do not count as
    deaths.
    """
    backoff = Backoff()
    for _ in range(20):
        backoff.failed()
    rest_s = backoff.rest_s
    backoff.served()

    assert REST_S[-1] == rest_s
    assert (True, 0.0) == (backoff.died(in_vain=True), backoff.rest_s)
    backoff.failed()
    assert 0.0 == backoff.rest_s


def test_forgetting_is_complete() -> None:
    """`forget` resets deaths and pauses."""
    backoff = Backoff()
    for _ in range(7):
        backoff.died(in_vain=True)
        backoff.failed()
    backoff.forget()
    nothing = (backoff.deaths, backoff.rest_s)

    assert (0, 0.0) == nothing
    assert (True, 0.0) == (backoff.died(in_vain=True), backoff.rest_s)
