"""Who has to move next, in each pair of states."""

from __future__ import annotations

from itertools import product

import pytest

from xenbackend.blkif.handshake import STEPS, Step, XenbusState
from xenbackend.doctor.handshake import Who, next_move

S = XenbusState


@pytest.mark.parametrize(("ours", "theirs"), list(product(S, S)))
def test_it_is_our_move_where_the_service_would_do_something(ours: XenbusState, theirs: XenbusState) -> None:
    """Each pair of states names who has to move: the service exactly if its table has a step that it has not taken."""
    move = next_move(ours, theirs)
    is_reached = ours is S.CONNECTED and theirs in (S.INITIALISED, S.CONNECTED)

    assert move.what
    assert (STEPS[ours, theirs] is not Step.WAIT and not is_reached) == (move.who is Who.SERVICE)


@pytest.mark.parametrize(
    ("ours", "theirs", "who", "words"),
    [
        (S.UNKNOWN, S.INITIALISING, Who.TOOLSTACK, "backend's directory"),
        (S.INIT_WAIT, S.UNKNOWN, Who.TOOLSTACK, "frontend's directory"),
        (S.INIT_WAIT, S.INITIALISING, Who.GUEST, "xen-blkfront"),
        (S.INIT_WAIT, S.INITIALISED, Who.SERVICE, "rings"),
        (S.CONNECTED, S.INITIALISED, Who.GUEST, "notice the disk"),
        (S.CONNECTED, S.CONNECTED, Who.NOBODY, "connected"),
        (S.CONNECTED, S.CLOSED, Who.SERVICE, "close"),
        (S.CLOSED, S.CLOSED, Who.NOBODY, "given the disk back"),
    ],
)  # fmt: skip
def test_what_has_to_be_done(ours: XenbusState, theirs: XenbusState, who: Who, words: str) -> None:
    """The pairs of states that administrators meet have the right next step."""
    move = next_move(ours, theirs)

    assert (who, True) == (move.who, words in move.what)


def test_no_rings_are_taken_before_the_script_has_come() -> None:
    """Until the hotplug script has run, the next move is the toolstack's, whatever the guest does."""
    for theirs in (S.INITIALISING, S.INITIALISED):
        move = next_move(S.INIT_WAIT, theirs, script_has_come=False)
        assert (Who.TOOLSTACK, True) == (move.who, "hotplug script" in move.what)
    assert Who.SERVICE is next_move(S.INITIALISING, S.INITIALISING, script_has_come=False).who
