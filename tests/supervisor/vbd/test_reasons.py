"""The reasons why a disk is not served: which is shown, and what clears it."""

from __future__ import annotations

import pytest

from xenbackend.supervisor.vbd.reasons import Cause, Reason, Reasons

CLEARED = {
    Cause.KEYS: {Reason.BAD_KEYS},
    Cause.RESUME: {
        Reason.CANNOT_OPEN,
        Reason.OTHER_FILE,
        Reason.OTHER_SIZE,
        Reason.GIVEN_UP,
        Reason.FLUSH_FAILED,
        Reason.INTERRUPTED,
    },
    Cause.ANEW: {Reason.OTHER_SIZE, Reason.GIVEN_UP, Reason.INTERRUPTED},
    Cause.LET_GO: {Reason.OTHER_SIZE, Reason.BAD_RINGS},
    Cause.JOIN: {Reason.HALTED},
    Cause.FRESH: {Reason.FLUSH_FAILED},
    Cause.SERVED: {Reason.INTERRUPTED},
    Cause.ENDED: {Reason.STORAGE, Reason.KEY, Reason.TROUBLE},
    Cause.REPLACED: {Reason.UNDECIDED},
}


def all_of_them() -> Reasons:
    """Return every reason at once."""
    reasons = Reasons()
    for reason in Reason:
        reasons.say(reason, reason.name)
    return reasons


def test_every_reason_can_be_cleared() -> None:
    """Each reason has something that clears it and a rank of its own."""
    assert all(reason.cleared_by for reason in Reason)
    assert list(Reason) == sorted(Reason, key=lambda reason: reason.rank)


@pytest.mark.parametrize("cause", list(Cause))
def test_a_cause_takes_away_its_own(cause: Cause) -> None:
    """A cause clears its own reasons, and leaves the others."""
    reasons = all_of_them()
    reasons.clear(cause)

    assert CLEARED[cause] == {reason for reason in Reason if not reasons[reason]}


def test_the_first_one_is_shown() -> None:
    """Of several reasons the one of the first rank is shown: what stops a disk comes before what only troubles it."""
    reasons = all_of_them()
    shown = []
    while reasons.first:
        shown.append((reasons.first, reasons.word()))
        reasons.say(reasons.first, "")

    assert list(Reason) == [reason for reason, _ in shown]
    assert ("cannot-open", "flush-failed", "") == (shown[0][1], shown[7][1], reasons.word())


def test_only_some_bar_a_worker() -> None:
    """Only some reasons keep a worker from being started; with any other the disk is served as far as possible."""
    reasons = all_of_them()
    bars = []
    while reasons.bar:
        bars.append(Reason[reasons.bar])
        reasons.say(bars[-1], "")

    others = [Reason.OTHER_FILE, Reason.OTHER_SIZE, Reason.GIVEN_UP]
    assert [Reason.CANNOT_OPEN, Reason.BAD_KEYS, Reason.UNDECIDED, *others] == bars
