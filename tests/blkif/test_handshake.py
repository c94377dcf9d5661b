"""The table of states is complete, and right where a mistake would cost a guest its disk."""

from __future__ import annotations

import pytest

from tests.tools.diagrams import states
from xenbackend.blkif.handshake import STEPS, Step, XenbusState, name, parse_state

S = XenbusState


def test_every_pair_has_a_step() -> None:
    """R16: each pair of our state and the frontend's has a defined step."""
    assert {(ours, theirs) for ours in S for theirs in S} == set(STEPS)


def test_a_new_vbd_is_offered_at_once() -> None:
    """Whatever state the frontend shows, a vbd in Initialising is offered: libxl waits for InitWait exactly."""
    assert {Step.OFFER} == {STEPS[S.INITIALISING, theirs] for theirs in S}


@pytest.mark.parametrize(
    ("ours", "theirs", "step"),
    [
        (S.INIT_WAIT, S.UNKNOWN, Step.WAIT),
        (S.INIT_WAIT, S.INITIALISED, Step.SERVE),
        (S.INIT_WAIT, S.CONNECTED, Step.SERVE),
        (S.CONNECTED, S.CONNECTED, Step.SERVE),
        (S.CONNECTED, S.CLOSING, Step.FOLLOW),
        (S.CONNECTED, S.CLOSED, Step.CLOSE),
        (S.CONNECTED, S.UNKNOWN, Step.CLOSE),
        (S.CONNECTED, S.INITIALISING, Step.RESTART),
        (S.CLOSING, S.CONNECTED, Step.WAIT),
        (S.CLOSING, S.CLOSED, Step.CLOSE),
        (S.CLOSED, S.INITIALISING, Step.OFFER),
        (S.CLOSED, S.INITIALISED, Step.SERVE),
        (S.CLOSED, S.CONNECTED, Step.WAIT),
    ],
)
def test_steps_of_the_life_cycle(ours: S, theirs: S, step: Step) -> None:
    """The pairs of states that every guest goes through lead to the same steps as in Linux blkback."""
    assert step == STEPS[ours, theirs]


def test_only_a_connectable_frontend_is_served() -> None:
    """Rings are read only while the frontend is Initialised or Connected."""
    assert {S.INITIALISED, S.CONNECTED} == {theirs for (_, theirs), step in STEPS.items() if step is Step.SERVE}


@pytest.mark.parametrize("text", [None, "", "9", "-1", "+4", "04", "4 ", "four", "\u0664", "4" * 5000])
def test_what_is_no_state_is_unknown(text: str | None) -> None:
    """R14: a guest may write anything as its state; all but the nine numbers count as unknown."""
    assert S.UNKNOWN == parse_state(text)


def test_states_are_decimal_digits() -> None:
    """Each state is read from its number as xenbus.h gives it."""
    assert list(S) == [parse_state(str(number)) for number in range(9)]


def test_the_diagram_shows_the_table() -> None:
    """The diagram has a row for each state of ours and every step in its place."""
    lines = states().splitlines()
    row = lines[1 + S.CONNECTED].split()

    assert 10 == len(lines)
    assert "InitWait" == name(S.INIT_WAIT)
    assert ["4", "Connected", *(STEPS[S.CONNECTED, theirs].value for theirs in S)] == row
