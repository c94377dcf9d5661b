"""What a look has found: one sentence, and one command for the person who wants to act on it. Values only.

Must not look at anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """The result of a look; UNKNOWN must never be taken for OK."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "unknown"  # the look was not possible


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    check      what was examined, as a word on which scripts may rely: docs/troubleshooting.md lists them
    sentence   for people
    command    what to run next; empty if there is nothing to do
    disk       such as ``5/xvda``; empty if the finding is not about a disk
    took_s     seconds that the look took, which may have other findings as well
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
    """Return the finding that all is well."""
    return Finding(check, Verdict.OK, sentence, disk=disk)


def wrong(check: str, sentence: str, command: str, *, disk: str = "") -> Finding:
    """Return the finding that something is wrong."""
    return Finding(check, Verdict.WRONG, sentence, command, disk)


def unknown(check: str, sentence: str, command: str = "", *, disk: str = "") -> Finding:
    """Return the finding that a look was not possible."""
    return Finding(check, Verdict.UNKNOWN, sentence, command, disk)


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """Return the verdict on all findings together: WRONG if any is wrong, else UNKNOWN if any is unknown, else OK."""
    verdicts = {each.verdict for each in findings}
    return next((each for each in (Verdict.WRONG, Verdict.UNKNOWN) if each in verdicts), Verdict.OK)
