"""The verdict of several findings."""

from __future__ import annotations

from xenbackend.doctor.finding import Verdict, ok, unknown, verdict_of, wrong


def test_what_could_not_be_looked_at_is_never_well() -> None:
    """A wrong finding decides the verdict, then an unknown one; it is well only if all are."""
    good, bad, dark = ok("a", "x"), wrong("b", "y", "z"), unknown("c", "w")

    assert Verdict.OK is verdict_of([good, good])
    assert Verdict.UNKNOWN is verdict_of([good, dark])
    assert Verdict.WRONG is verdict_of([dark, bad, good])
    assert [False, True, False] == [each.is_wrong for each in (good, bad, dark)]
