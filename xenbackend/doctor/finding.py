"""What a look has found: one sentence, and one command for who wants to do something about it. Values only.

Must not look at anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What came of a look; that nobody could look is never good news."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "unknown"  # it could not be looked at


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    check      what was looked at, in a word that scripts may go by: docs/troubleshooting.md lists them
    sentence   for people
    command    what to run next; empty where there is nothing to do
    disk       ``5/xvda``; empty where it is not about one
    took_s     seconds that the look took, with whatever else was looked at together with it
    """

    check: str
    verdict: Verdict
    sentence: str
    command: str = ""
    disk: str = ""
    took_s: float = 0.0

    @property
    def is_wrong(self) -> bool:
        """Whether something has to be done."""
        return self.verdict is Verdict.WRONG


def ok(check: str, sentence: str, *, disk: str = "") -> Finding:
    """Return that all is well there."""
    return Finding(check, Verdict.OK, sentence, disk=disk)


def wrong(check: str, sentence: str, command: str, *, disk: str = "") -> Finding:
    """Return that something is not as it should be."""
    return Finding(check, Verdict.WRONG, sentence, command, disk)


def unknown(check: str, sentence: str, command: str = "", *, disk: str = "") -> Finding:
    """Return that nobody could look."""
    return Finding(check, Verdict.UNKNOWN, sentence, command, disk)


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """Return what is to be said of all together: one that is wrong decides, then one that is not known."""
    verdicts = {each.verdict for each in findings}
    return next((each for each in (Verdict.WRONG, Verdict.UNKNOWN) if each in verdicts), Verdict.OK)
