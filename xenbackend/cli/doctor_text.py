"""Findings of `xenbackend doctor` as lines for people.

Must not decide what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TextIO

from xenbackend.doctor.finding import Finding, Verdict
from xenbackend.errors import printable

_COLORS = {Verdict.OK: "32", Verdict.WRONG: "31", Verdict.UNKNOWN: "33"}
_WIDTH = max(map(len, Verdict))


def wants_color(stream: TextIO) -> bool:
    """Return whether words may be colored there: https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def lines(findings: list[Finding], *, with_ok: bool, is_colored: bool) -> Iterator[str]:
    """Yield a line for each finding, its command below it, and a last line that sums up."""
    for each in findings:
        if with_ok or each.verdict is not Verdict.OK:
            yield from _lines(each, is_colored=is_colored)
    yield _sum(findings)


def _lines(finding: Finding, *, is_colored: bool) -> Iterator[str]:
    word = finding.verdict.value.ljust(_WIDTH)
    if is_colored:
        word = f"\x1b[{_COLORS[finding.verdict]}m{word}\x1b[0m"
    about = f"{finding.disk} {finding.check}" if finding.disk else finding.check
    yield f"{word}  {about}: {printable(finding.sentence)}"
    if finding.command:
        yield f"{' ' * _WIDTH}  -> {printable(finding.command)}"


def _sum(findings: Iterable[Finding]) -> str:
    counts = dict.fromkeys(Verdict, 0)
    for each in findings:
        counts[each.verdict] += 1
    well = f"{counts[Verdict.OK]} of {sum(counts.values())} checks found nothing wrong"
    if not counts[Verdict.WRONG] and not counts[Verdict.UNKNOWN]:
        return well
    return f"{well}, {counts[Verdict.WRONG]} something wrong, {counts[Verdict.UNKNOWN]} could not be made"
