"""How often workers have died, and what follows from it."""

from __future__ import annotations

from xenbackend.supervisor.vbd.backoff import REST_S, Backoff


def test_who_dies_in_vain_again_and_again_has_no_successor_in_the_end() -> None:
    """Each pause is at least as long as the one before, the first one is none; after the last there is a sentence."""
    deaths = Backoff()
    rests = []
    for _ in REST_S:
        deaths.died("it died", in_vain=True)
        assert not deaths.stopped
        rests.append(deaths.rest_s)
    deaths.died("it died", in_vain=True)

    assert [0.0, *sorted(rests[1:])] == rests
    assert "it died, 7 in a row; `xenbackend resume` starts another one" == deaths.stopped


def test_a_single_answer_to_the_guest_begins_the_count_anew() -> None:
    """A worker that got on is followed at once, whatever there was before it."""
    deaths = Backoff()
    for _ in range(5):
        deaths.died("it died", in_vain=True)
    deaths.died("it died", in_vain=False)

    assert ("it died", "", 0.0) == (deaths.lost, deaths.stopped, deaths.rest_s)


def test_to_serve_for_a_moment_does_not_begin_the_count_anew() -> None:
    """A worker that serves until it comes to the request that kills it has not helped, though nothing is shown then."""
    deaths = Backoff()
    for _ in range(7):
        deaths.died("it died", in_vain=True)
        deaths.served()

    assert ("", True) == (deaths.lost, bool(deaths.stopped))


def test_what_cannot_be_opened_is_tried_for_ever() -> None:
    """Failures make the pauses longer, up to the longest one, and never stop; they are no deaths."""
    deaths = Backoff()
    for _ in range(20):
        deaths.failed("no such file")
    rest_s = deaths.rest_s
    deaths.served()
    deaths.died("it died", in_vain=True)

    assert (REST_S[-1], "") == (rest_s, deaths.stopped)
    assert 0.0 == deaths.rest_s
    deaths.failed("no such file")
    assert 0.0 == deaths.rest_s


def test_forgetting_is_complete() -> None:
    """Whoever begins anew has all lives again."""
    deaths = Backoff()
    for _ in range(7):
        deaths.died("it died", in_vain=True)
    deaths.forget()
    nothing = (deaths.lost, deaths.stopped, deaths.rest_s)
    deaths.died("it died", in_vain=True)

    assert ("", "", 0.0) == nothing
    assert ("", 0.0) == (deaths.stopped, deaths.rest_s)
